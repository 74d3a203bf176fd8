"""Predicted loss of candidates, in nats per token.

Notation: y = W x for token t, g_t = ∂L/∂y_t, Q the activation rounding and Ŵ the decoded candidate.
`token_fisher` is ½ E_t[(g_t · (Q(x_t) Ŵᵀ − x_t Wᵀ))²]: the second-order term of KL(original ‖ quantized), tokens
taken as independent. `fisher_trace` is ½ E_t[|g_t|²|x_t|²] · mean(ΔW²), the objective of diagonal-Fisher methods.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from operator import add as operator_add

import torch
from torch import Tensor

from prismaquant_ray.block_records import Price, PriceOn
from prismaquant_ray.calibration.dataset import CalibrationSet
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Split:
    """The N of prices: every calibration token, also where p is of few (routed) or of other things (patches).

    `held_out_tokens` are those of the sequences that no candidate was fitted to.
    """

    tokens: int
    held_out_tokens: int

    @classmethod
    def of(cls, calibration: CalibrationSet) -> Split:
        """The split of a calibration set."""
        return cls(tokens=calibration.positions, held_out_tokens=calibration.held_out_positions)


def price(squares: Tensor, holdout: Tensor, split: Split) -> Price:
    """½ Σ_t p_t² / N on all sequences, on those held out and on the others.

    `squares` (3, sequences) are ½ Σ p² of each sequence, for p summed over the members of the fused group: of both
    roundings, and of rounded weights and rounded activations alone. `holdout` (sequences,) marks those that no
    candidate was fitted to. Standard errors are by jackknife over sequences.
    """
    found = price_on(squares, split.tokens)
    held_out = price_on(squares[:, holdout], split.held_out_tokens)
    fitted = price_on(squares[:, ~holdout], split.tokens - split.held_out_tokens)
    return Price(
        cost=found.cost,
        standard_error=found.standard_error,
        weight_cost=found.weight_cost,
        activation_cost=found.activation_cost,
        held_out=held_out,
        fitted=fitted,
    )


def price_on(squares: Tensor, tokens: int) -> PriceOn:
    """½ Σ_t p_t² / N of some sequences (3, sequences) with N tokens, see `price`; 0 without any."""
    squares = squares.to(torch.float64)
    sequences, total = squares.shape[1], [_in_order(row) for row in squares]
    n = max(tokens, 1)
    left_out = (total[0] - squares[0]) * sequences / (max(sequences - 1, 1) * n)
    return PriceOn(
        cost=total[0] / n,
        standard_error=standard_error(left_out),
        weight_cost=total[1] / n,
        activation_cost=total[2] / n,
    )


def _in_order(values: Tensor) -> float:
    """The sum of values (n,), one after the other: the same whatever the number of threads."""
    return functools.reduce(operator_add, values.tolist(), 0.0)


def sums_of_squares(p: Tensor) -> Tensor:
    """Σ_t p² of each sequence (sequences,) in float64, for p (sequences, tokens)."""
    return p.to(torch.float64).square().sum(-1)
