"""Predicted loss of candidates, in nats per token.

Notation: y = W x for token t, g_t = ∂L/∂y_t, Q the activation rounding and Ŵ the decoded candidate.
`token_fisher` is ½ E_t[(g_t · (Q(x_t) Ŵᵀ − x_t Wᵀ))²]: the second-order term of KL(original ‖ quantized), tokens
taken as independent. `fisher_trace` is ½ E_t[|g_t|²|x_t|²] · mean(ΔW²), the objective of diagonal-Fisher methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def projected_error(grad_output: Tensor, output_error: Tensor) -> Tensor:
    """p_t = g_t · Δy_t for both arguments (tokens, O); (tokens,)."""
    return (grad_output * output_error).sum(-1)


def fisher_trace(grad_output: Tensor, x: Tensor) -> Tensor:
    """Per output channel Σ_t g_ti² |x_t|² (O,), for g (tokens, O) and x (tokens, I); its sum is the trace."""
    return grad_output.square().T @ x.square().sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """One candidate's price.

    `cost` ½ Σ p² / N, `first_order` Σ p / N, `standard_error` of the cost by jackknife over sequences.
    """

    cost: float
    first_order: float
    standard_error: float


def price(p: Tensor) -> Cost:
    """From p (sequences, tokens) float32, summed over the members of the fused group; N is every token of p."""
    p = p.to(torch.float64)
    sequences, tokens = p.shape
    squares = 0.5 * p.square().sum(-1)
    total = float(squares.sum())
    if sequences > 1:
        left_out = (total - squares) / ((sequences - 1) * tokens)
        spread = (sequences - 1) / sequences * (left_out - left_out.mean()).square().sum()
        standard_error = float(spread.sqrt())
    else:
        standard_error = 0.0
    count = sequences * tokens
    return Cost(cost=total / count, first_order=float(p.sum()) / count, standard_error=standard_error)
