"""Predicted loss of candidates, in nats per token.

Notation: y = W x for token t, g_t = ∂L/∂y_t, Q the activation rounding and Ŵ the decoded candidate.
`token_fisher` is ½ E_t[(g_t · (Q(x_t) Ŵᵀ − x_t Wᵀ))²]: the second-order term of KL(original ‖ quantized), tokens
taken as independent. `fisher_trace` is ½ E_t[|g_t|²|x_t|²] · mean(ΔW²), the objective of diagonal-Fisher methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def price(p: Tensor, squares: Tensor, tokens: int) -> Cost:
    """From p of every token, float32, summed over the members of the fused group, and ½ Σ p² of each sequence.

    `tokens` is N: every token of the calibration set, also where p is of few (routed) or of other things (patches).
    """
    squares = squares.to(torch.float64)
    sequences = len(squares)
    total = float(squares.sum())
    if sequences > 1:
        left_out = (total - squares) * sequences / ((sequences - 1) * tokens)
        spread = (sequences - 1) / sequences * (left_out - left_out.mean()).square().sum()
        standard_error = float(spread.sqrt())
    else:
        standard_error = 0.0
    return Cost(
        cost=total / tokens,
        first_order=float(p.to(torch.float64).sum()) / tokens,
        standard_error=standard_error,
    )


def half_squares(p: Tensor) -> Tensor:
    """½ Σ_t p² of each sequence (sequences,) in float64, for p (sequences, tokens)."""
    return 0.5 * p.to(torch.float64).square().sum(-1)
