"""How far a quantized model's predictions are from the source's, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Over all tokens: mean, 90th and 99th percentile of KL(source ‖ quantized) in nats, and top-1 agreement."""

    tokens: int
    kl_mean: float
    kl_p90: float
    kl_p99: float
    top1_agreement: float


def token_kl(source: Tensor, quantized: Tensor) -> Tensor:
    """KL(source ‖ quantized) per token (tokens,) in nats, from logits (tokens, V), in float64."""
    log_p = torch.log_softmax(source.double(), dim=-1)
    log_q = torch.log_softmax(quantized.double(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def summarize(kl: Tensor, agree: Tensor) -> Divergence:
    """From KL per token and whether the most likely token is the same, both (tokens,)."""
    return Divergence(
        tokens=kl.numel(),
        kl_mean=float(kl.mean()),
        kl_p90=float(torch.quantile(kl, 0.90)),
        kl_p99=float(torch.quantile(kl, 0.99)),
        top1_agreement=float(agree.double().mean()),
    )
