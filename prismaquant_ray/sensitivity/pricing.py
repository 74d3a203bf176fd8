"""Pricing every candidate of a block while its gradients go by.

One matrix product per parameter and format is all a format adds, and it tells both parts of the error: with
D = g (Ŵ − W), that of the rounded weights is x · D, that of the rounded activations (Q(x) − x) · (g W + D), where
g W has been computed already: it is the gradient that goes on to x. No large numbers are subtracted, so the product
may be in the model's own type. Nothing is differentiated with respect to weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prismaquant_ray.checkpoint.decoded_candidates import CandidateDecoder, CandidateTensors, Decoded
from prismaquant_ray.errors import InputError
from prismaquant_ray.finite import all_finite
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.layout import Block, FusedGroup, LinearSpec, Matrix
from prismaquant_ray.models.capture import CapturedActivations
from prismaquant_ray.models.experts import Routing
from prismaquant_ray.sensitivity.cost import fisher_trace, half_squares, price


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockSensitivity:
    """What the backward pass learned of a block.

    `vectors` holds p (tokens of all sequences,) float32 under "group|format" and the channel traces (O,) or (E, O)
    under "linear|trace"; `figures` holds prices and traces for the record.
    """

    vectors: dict[str, Tensor]
    figures: dict[str, Any]


@dataclass(slots=True, eq=False)
class _Priced:
    """One format of one fused group while microbatches arrive.

    Weights stay in the BF16 they decode to: float32 copies of every format would be the largest thing in memory.
    `parts` is ½ Σ p² of either cause of the error alone.
    """

    decoded: Decoded
    p: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    parts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))


class Passed(NamedTuple):
    """Gradients of the loss at a parameter: ∂L/∂x through it alone (…, I), and ∂L/∂y (…, O)."""

    at_input: Tensor
    at_output: Tensor


class _Parts(NamedTuple):
    """p of every token (tokens,) by cause: the rounded weights at exact inputs, and what rounded inputs add."""

    weights: Tensor
    activations: Tensor


class Pricing:
    """Prices of a block's candidates, added up microbatch by microbatch."""

    def __init__(
        self,
        block: Block,
        module: nn.Module,
        formats: Sequence[FormatName],
        candidates: CandidateTensors,
        device: torch.device,
    ) -> None:
        self.block = block
        self.module = module
        self.device = device
        self.traces: dict[str, Tensor] = {
            parameter: torch.zeros(*_channels(matrix, parameter), device=device)
            for group in block.groups
            for matrix in group.matrices
            for parameter in matrix.parameters
        }
        decoder = CandidateDecoder(candidates, device)
        self.priced: dict[str, dict[FormatName, _Priced]] = {
            group.name: {
                name: _Priced(decoder.decode(group, name))
                for name in formats_of(group, formats)
                if FORMATS[name].codec is not None
            }
            for group in block.groups
        }

    def add(self, captured: CapturedActivations, passed: Mapping[str, Passed], sequences: int) -> bool:
        """One microbatch of so many sequences, with the gradients at every parameter; whether all is finite."""
        found: dict[tuple[str, FormatName], _Parts] = {}
        for entry in self.block.inputs:
            x = captured.inputs[entry.name].detach().flatten(0, -2).float()
            routing = captured.routing.get(entry.name)
            changes: dict[FormatName, Tensor] = {}
            for group, matrix in self._reading(entry.name):
                flat = {name: Passed(*(g.flatten(0, -2) for g in passed[name])) for name in matrix.parameters}
                for parameter, (_, at_output) in flat.items():
                    self._trace(parameter, at_output.float(), x, routing)
                arriving = functools.reduce(torch.add, (at_input.float() for at_input, _ in flat.values()))
                for name, priced in self.priced[group.name].items():
                    rounding = FORMATS[name].round_activation
                    if rounding is not None and name not in changes:
                        changes[name] = rounding(x, priced.decoded.input_scales[matrix.parameters[0]]).sub_(x)
                    through = functools.reduce(
                        torch.add,
                        (
                            self._through(parameter, g, priced.decoded.weights[parameter], routing)
                            for parameter, (_, g) in flat.items()
                        ),
                    )
                    weights = (x * through).sum(-1)
                    activations = (
                        (through.add_(arriving).mul_(changes[name])).sum(-1)
                        if name in changes
                        else torch.zeros_like(weights)
                    )
                    parts = _Parts(weights, activations)
                    parts = parts if routing is None else _Parts(*(routing.to_tokens(part) for part in parts))
                    before = found.get((group.name, name))
                    found[group.name, name] = parts if before is None else _Parts(*map(torch.add, before, parts))
        sound = True
        for (group_name, name), parts in found.items():
            priced = self.priced[group_name][name]
            p = parts.weights + parts.activations
            priced.p.append(p)
            priced.squares.append(half_squares(p.view(sequences, -1)))
            priced.parts += torch.stack([half_squares(part) for part in parts]).cpu()
            sound = sound and all_finite(p)
        return sound

    def _through(self, parameter: str, gradient: Tensor, rounded: Tensor, routing: Routing | None) -> Tensor:
        """g (Ŵ − W) (rows, I) in float32, for g (rows, O): the product in g's type."""
        weight = self.module.get_parameter(parameter)
        if routing is None:
            return _times_difference(gradient, rounded, weight)
        pieces = enumerate(gradient.split(routing.counts.tolist()))
        return torch.cat([_times_difference(g, rounded[at], weight[at]) for at, g in pieces if len(g)])

    def _reading(self, name: str) -> list[tuple[FusedGroup, Matrix]]:
        return [(group, matrix) for group in self.block.groups for matrix in group.matrices if matrix.input == name]

    def _trace(self, parameter: str, gradient: Tensor, x: Tensor, routing: Routing | None) -> None:
        if routing is None:
            self.traces[parameter] += fisher_trace(gradient, x)
            return
        counts = routing.counts.tolist()
        for expert, (g, rows) in enumerate(zip(gradient.split(counts), x.split(counts), strict=True)):
            self.traces[parameter][expert] += fisher_trace(g, rows)

    def finish(self, tokens: int) -> BlockSensitivity:
        """Prices per token of `tokens`, traces and p vectors; InputError when no gradient reached the block."""
        vectors: dict[str, Tensor] = {}
        groups: dict[str, Any] = {}
        for group in self.block.groups:
            groups[group.name] = {}
            for name, priced in self.priced[group.name].items():
                p = torch.cat(priced.p)
                vectors[f"{group.name}|{name}"] = p
                cost = price(p, torch.cat(priced.squares), tokens)
                groups[group.name][name] = {
                    "cost": cost.cost,
                    "first_order": cost.first_order,
                    "standard_error": cost.standard_error,
                    "weight_cost": float(priced.parts[0]) / tokens,
                    "activation_cost": float(priced.parts[1]) / tokens,
                }
        traces: dict[str, float | list[float]] = {}
        for group in self.block.groups:
            for matrix in group.matrices:
                for linear, trace in self._by_linear(matrix):
                    if not bool(trace.any()):
                        raise InputError(
                            f"{linear.name}: its gradient is zero for every calibration token; it cannot be priced"
                        )
                    traces[linear.name] = (trace.sum(-1) / tokens).tolist()
                    vectors[f"{linear.name}|trace"] = trace
        figures = {"groups": groups, "fisher_trace": traces, "tokens": tokens}
        return BlockSensitivity(vectors=vectors, figures=figures)

    def _by_linear(self, matrix: Matrix) -> list[tuple[LinearSpec, Tensor]]:
        if matrix.experts is None:
            return [(linear, self.traces[p]) for linear, p in zip(matrix.linears, matrix.parameters, strict=True)]
        trace = self.traces[matrix.parameters[0]]
        pairs = zip(matrix.linears, matrix.rows, strict=True)
        return [(linear, trace[:, rows].contiguous()) for linear, rows in pairs]


def _channels(matrix: Matrix, parameter: str) -> tuple[int, ...]:
    if matrix.experts is not None:
        return (matrix.experts, matrix.rows[-1].stop)
    return (matrix.linears[matrix.parameters.index(parameter)].out_features,)


def _times_difference(gradient: Tensor, rounded: Tensor, weight: Tensor) -> Tensor:
    return (gradient @ (rounded.to(weight.dtype) - weight)).float()
