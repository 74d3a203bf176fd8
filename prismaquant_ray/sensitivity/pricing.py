"""Pricing every candidate of a block while its gradients go by.

One matrix product per parameter and codec is all a format adds; nothing is differentiated with respect to weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import stack
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.layout import Block, FusedGroup, LinearSpec, Matrix
from prismaquant_ray.models.experts import Routing, grouped_product
from prismaquant_ray.models.taps import Taps
from prismaquant_ray.sensitivity.cost import fisher_trace, half_squares, price, projected_error

CandidateTensors = Mapping[FormatName, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockSensitivity:
    """What the backward pass learned of a block.

    `vectors` holds p (tokens of all sequences,) float32 under "group|format" and the channel traces (O,) or (E, O)
    under "linear|trace"; `figures` holds prices and traces for the record.
    """

    vectors: dict[str, Tensor]
    figures: dict[str, Any]


@dataclass(kw_only=True, slots=True, eq=False)
class _Priced:
    """One format of one fused group while microbatches arrive. `weights` are decoded, by parameter.

    They stay in the BF16 they decode to: float32 copies of every format would be the largest thing in memory.
    """

    weights: dict[str, Tensor]
    input_scales: dict[str, Tensor | None]
    p: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    squared_error: dict[str, float] = field(default_factory=dict)


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
        self.rows: dict[str, int] = {}
        self.traces: dict[str, Tensor] = {
            parameter: torch.zeros(*_channels(matrix, parameter), device=device)
            for group in block.groups
            for matrix in group.matrices
            for parameter in matrix.parameters
        }
        decoded: dict[tuple[str, str], Tensor] = {}
        self.priced: dict[str, dict[FormatName, _Priced]] = {
            group.name: {
                name: self._decode(group, name, candidates[name], decoded)
                for name in formats_of(group, formats)
                if FORMATS[name].codec is not None
            }
            for group in block.groups
        }

    def _decode(
        self, group: FusedGroup, name: FormatName, tensors: Mapping[str, Tensor], decoded: dict[tuple[str, str], Tensor]
    ) -> _Priced:
        codec = FORMATS[name].codec
        assert codec is not None
        priced = _Priced(weights={}, input_scales={})
        for matrix in group.matrices:
            scale = tensors.get(f"{matrix.linears[0].names[0]}.input_global_scale")
            for parameter, linears in members(matrix).items():
                key = (parameter, codec.name)
                if key not in decoded:
                    weights = [codec.decode(own(tensors, linear)) for linear in linears]
                    decoded[key] = torch.cat(weights, dim=-2).to(self.device)
                priced.weights[parameter] = decoded[key]
                priced.input_scales[parameter] = None if scale is None else scale.to(self.device)
                priced.squared_error[parameter] = 0.0
        return priced

    def add(self, taps: Taps, gradients: Mapping[str, Tensor], sequences: int) -> None:
        """One microbatch of so many sequences; `gradients` are ∂L/∂output by parameter."""
        p: dict[tuple[str, FormatName], Tensor] = {}
        for entry in self.block.inputs:
            x = taps.inputs[entry.name].detach().flatten(0, -2).float()
            routing = taps.routing.get(entry.name)
            rounded: dict[FormatName, Tensor] = {}
            for group, matrix in self._reading(entry.name):
                for parameter in matrix.parameters:
                    gradient = gradients[parameter].flatten(0, -2).float()
                    clean = self._product(parameter, taps, x, routing)
                    self.rows[parameter] = self.rows.get(parameter, 0) + len(x)
                    self._trace(parameter, gradient, x, routing)
                    for name, priced in self.priced[group.name].items():
                        if name not in rounded:
                            rounding = FORMATS[name].round_activation
                            scale = priced.input_scales[parameter]
                            rounded[name] = x if rounding is None else rounding(x, scale)
                        error = _times(rounded[name], priced.weights[parameter], routing).sub_(clean)
                        own_p = projected_error(gradient, error)
                        if routing is not None:
                            own_p = routing.to_tokens(own_p)
                        key = (group.name, name)
                        p[key] = p[key].add_(own_p) if key in p else own_p
                        priced.squared_error[parameter] += float(error.square().sum())
        for (group_name, name), values in p.items():
            priced = self.priced[group_name][name]
            priced.p.append(values)
            priced.squares.append(half_squares(values.view(sequences, -1)))

    def _reading(self, name: str) -> list[tuple[FusedGroup, Matrix]]:
        return [(group, matrix) for group in self.block.groups for matrix in group.matrices if matrix.input == name]

    def _trace(self, parameter: str, gradient: Tensor, x: Tensor, routing: Routing | None) -> None:
        if routing is None:
            self.traces[parameter] += fisher_trace(gradient, x)
            return
        counts = routing.counts.tolist()
        for expert, (g, rows) in enumerate(zip(gradient.split(counts), x.split(counts), strict=True)):
            self.traces[parameter][expert] += fisher_trace(g, rows)

    def _product(self, parameter: str, taps: Taps, x: Tensor, routing: Routing | None) -> Tensor:
        """x Wᵀ in float32: the parameter's own output without its bias, unless that has fewer bits."""
        output = taps.outputs[parameter].detach().flatten(0, -2)
        if output.dtype != torch.float32:
            return _times(x, self.module.get_parameter(parameter), routing)
        bias = getattr(self.module.get_submodule(parameter.rpartition(".")[0]), "bias", None)
        return output if bias is None else output - bias

    def finish(self, tokens: int) -> BlockSensitivity:
        """Prices per token of `tokens`, traces and p vectors; InputError when no gradient reached the block."""
        vectors: dict[str, Tensor] = {}
        groups: dict[str, Any] = {}
        outputs: dict[str, dict[str, float]] = {}
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
                }
                for parameter, squared in priced.squared_error.items():
                    width = self.traces[parameter].shape[-1]
                    outputs.setdefault(parameter, {})[name] = squared / (max(self.rows[parameter], 1) * width)
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
        figures = {"groups": groups, "fisher_trace": traces, "output_mse": outputs, "tokens": tokens}
        return BlockSensitivity(vectors=vectors, figures=figures)

    def _by_linear(self, matrix: Matrix) -> list[tuple[LinearSpec, Tensor]]:
        if matrix.experts is None:
            return [(linear, self.traces[p]) for linear, p in zip(matrix.linears, matrix.parameters, strict=True)]
        trace = self.traces[matrix.parameters[0]]
        pairs = zip(matrix.linears, matrix.rows, strict=True)
        return [(linear, trace[:, rows].contiguous()) for linear, rows in pairs]


def members(matrix: Matrix) -> dict[str, tuple[LinearSpec, ...]]:
    """The Linears in each parameter of a matrix: one in a Linear's own, all of them in a packed one."""
    if matrix.experts is not None:
        return {matrix.parameters[0]: matrix.linears}
    return {parameter: (linear,) for parameter, linear in zip(matrix.parameters, matrix.linears, strict=True)}


def own(tensors: Mapping[str, Tensor], linear: LinearSpec) -> dict[str, Tensor]:
    """A Linear's shipped tensors by suffix; those of every expert as one stack."""
    suffixes = [name.rpartition(".")[2] for name in tensors if name.rpartition(".")[0] == linear.names[0]]
    each = [{suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes} for name in linear.names]
    return each[0] if linear.experts is None else stack(each)


def _channels(matrix: Matrix, parameter: str) -> tuple[int, ...]:
    if matrix.experts is not None:
        return (matrix.experts, matrix.rows[-1].stop)
    return (matrix.linears[matrix.parameters.index(parameter)].out_features,)


def _times(x: Tensor, weight: Tensor, routing: Routing | None) -> Tensor:
    """x Wᵀ in x's type, whatever the weight's."""
    return F.linear(x, weight.to(x.dtype)) if routing is None else grouped_product(x, weight, routing.counts)
