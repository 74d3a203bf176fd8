"""Divergence of a quantized model's predictions from the source's, per token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prismaquant_ray.jackknife import standard_error
from prismaquant_ray.records import Divergence


class TokenFigures(NamedTuple):
    """Figures per token (tokens,): KL in nats, whether the most likely tokens agree, loss (NaN where not taken)."""

    kl: Tensor
    agrees: Tensor
    loss: Tensor


class SourceLogits:
    """The source's logits (tokens, V) for a piece of text; other models are compared with them.

    `following` (tokens,) holds the next token ids, negative where no loss is taken.
    """

    def __init__(self, logits: Tensor, following: Tensor) -> None:
        self.logits = logits.double()
        self.following = following
        self.best = logits.argmax(-1)
        self.total = self.logits.logsumexp(-1)
        self.probabilities = (self.logits - self.total.unsqueeze(-1)).exp_()

    def against(self, logits: Tensor) -> TokenFigures:
        """Figures of a model with these logits (tokens, V): KL = Σ p (z_p − z_q) + log Σ exp z_q − log Σ exp z_p."""
        best = logits.argmax(-1)
        logits = logits.double()
        total = logits.logsumexp(-1)
        kl = (self.probabilities * (self.logits - logits)).sum(-1) + total - self.total
        target = logits.gather(-1, self.following.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        loss = (total - target).masked_fill(self.following < 0, math.nan)
        return TokenFigures(kl=kl, agrees=best == self.best, loss=loss)


def summarize(figures: TokenFigures, sequence: Tensor) -> Divergence:
    """Summary of per-token figures; `sequence` (tokens,) is the index of each token's sequence."""
    kl = figures.kl.double()
    mean = mean_of(kl, sequence)
    loss = float(figures.loss.double().nanmean())
    return Divergence(
        tokens=kl.numel(),
        kl_mean=mean.mean,
        kl_standard_error=mean.standard_error,
        kl_p90=_quantile(kl, 0.90),
        kl_p99=_quantile(kl, 0.99),
        top1_agreement=float(figures.agrees.double().mean()),
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
    )


class Mean(NamedTuple):
    """A mean over tokens and its standard error, with sequences as the independent samples."""

    mean: float
    standard_error: float


def mean_of(values: Tensor, sequence: Tensor) -> Mean:
    """Mean of `values` (tokens,), with a jackknife over sequences; `sequence` (tokens,) is each token's sequence."""
    totals, counts = _sums(values, sequence), _sums(torch.ones_like(values), sequence)
    left_out = (totals.sum() - totals) / (counts.sum() - counts)
    return Mean(float(values.mean()), standard_error(left_out))


def _sums(values: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(int(index.max()) + 1, dtype=values.dtype).index_add_(0, index, values)


def _quantile(values: Tensor, share: float) -> float:
    # torch.quantile accepts at most 2^24 values.
    position = share * (values.numel() - 1)
    low = math.floor(position)
    ordered = values.sort().values
    high = min(low + 1, values.numel() - 1)
    return float(ordered[low] + (position - low) * (ordered[high] - ordered[low]))
