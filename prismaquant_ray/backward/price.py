"""Predicted loss of candidates, in nats per token.

Notation: y = W x for token t, g_t = ∂L/∂y_t, Q the activation rounding and Ŵ the decoded candidate.
`token_fisher` is ½ E_t[(g_t · (Q(x_t) Ŵᵀ − x_t Wᵀ))²]: the second-order term of KL(original ‖ quantized), tokens
taken as independent. `fisher_trace` is ½ E_t[|g_t|²|x_t|²] · mean(ΔW²), the objective of diagonal-Fisher methods.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from prismaquant_ray.block_records import Price
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.jackknife import standard_error
from prismaquant_ray.kernels import operator


def fisher_trace(grad_output: Tensor, x: Tensor) -> Tensor:
    """Per output channel Σ_t g_ti² |x_t|² (O,), for g (tokens, O) and x (tokens, I); its sum is the trace."""
    return grad_output.square().T @ x.square().sum(-1)


def _expert_traces(grad_output: Tensor, x: Tensor, own: Tensor) -> Tensor:
    sizes = own.sum(1).tolist()
    pieces = zip(grad_output.split(sizes), x.split(sizes), strict=True)
    return torch.stack([fisher_trace(*piece) for piece in pieces])


#: `fisher_trace` of every expert (E, O), for g (R, O) and x (R, I), sorted by expert, and whose each row is (E, R).
expert_traces = operator("expert_traces(Tensor grad_output, Tensor x, Tensor own) -> Tensor", _expert_traces)


def weight_change(rounded: Tensor, weight: Tensor) -> Tensor:
    """ΔW = Ŵ − W (…, O, I) in W's type."""
    return rounded.to(weight.dtype) - weight


def weight_projection(x: Tensor, difference: Tensor) -> Tensor:
    """g_t · x_t ΔWᵀ = x_t · D_t (tokens,): p of rounded weights at exact inputs, for x and D (tokens, I)."""
    return (x * difference).sum(-1)


def activation_projection(input_error: Tensor, difference: Tensor, grad_input: Tensor) -> Tensor:
    """g_t · (Q(x_t) − x_t) Ŵᵀ = (Q(x_t) − x_t) · (D_t + g_t W) (tokens,): the contribution of rounded inputs to p.

    All are (tokens, I): `input_error` Q(x) − x, `difference` D, which is overwritten, and `grad_input` g W. With
    `weight_projection` it adds up to p_t = g_t · (Q(x_t) Ŵᵀ − x_t Wᵀ).
    """
    return difference.add_(grad_input).mul_(input_error).sum(-1)


def input_error(x: Tensor, input_scale: Tensor | None, name: FormatName) -> Tensor | None:
    """Q(x) − x (rows, I) of a format, or None where it keeps activations."""
    rounding = FORMATS[name].round_activation
    return None if rounding is None else rounding(x, input_scale).sub_(x)


def projections(x: Tensor, difference: Tensor, grad_input: Tensor, rounded_away: Tensor | None) -> Tensor:
    """Both parts of p (2, rows): `weight_projection` and `activation_projection`; see there. Overwrites D."""
    weights = weight_projection(x, difference)
    if rounded_away is None:
        return torch.stack([weights, torch.zeros_like(weights)])
    return torch.stack([weights, activation_projection(rounded_away, difference, grad_input)])


def _rounded_projections(
    x: Tensor, difference: Tensor, grad_input: Tensor, input_scale: Tensor | None, name: str
) -> Tensor:
    return projections(x, difference.clone(), grad_input, input_error(x, input_scale, FormatName(name)))


#: `projections` with the error of the input as a format rounds it; all (rows, I) float32.
rounded_projections = operator(
    "rounded_projections(Tensor x, Tensor difference, Tensor grad_input, Tensor? input_scale, str format) -> Tensor",
    _rounded_projections,
)


def price(squares: Tensor, parts: Tensor, tokens: int) -> Price:
    """½ Σ_t p_t² / N, from ½ Σ p² of each sequence (sequences,), p summed over the members of the fused group.

    `parts` (microbatches, 2) are ½ Σ p² of rounded weights and of rounded activations alone. `tokens` is N: every
    token of the calibration set, also where p is of few (routed) or of other things (patches). The standard error is
    by jackknife over sequences.
    """
    squares = squares.to(torch.float64)
    sequences = len(squares)
    total, (weights, activations) = float(squares.sum()), _in_order(parts)
    left_out = (total - squares) * sequences / ((sequences - 1) * tokens)
    return Price(
        cost=total / tokens,
        standard_error=standard_error(left_out),
        weight_cost=weights / tokens,
        activation_cost=activations / tokens,
    )


def _in_order(parts: Tensor) -> list[float]:
    """Sums over the first dimension, one after the other: the same whatever the number of threads."""
    total: list[float] = functools.reduce(torch.add, parts, torch.zeros(2, dtype=parts.dtype)).tolist()
    return total


def sums_of_squares(p: Tensor) -> Tensor:
    """Σ_t p² of each sequence (sequences,) in float64, for p (sequences, tokens)."""
    return p.to(torch.float64).square().sum(-1)
