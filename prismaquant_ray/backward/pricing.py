"""Pricing every candidate of a block while its gradients go by.

Each format costs one matrix product per parameter, D = g ΔW with ΔW = Ŵ − W. `price.weight_projection` and
`price.activation_projection` derive both parts of the error from it, because g W is known: it is the gradient with
respect to x. No large numbers are subtracted, so the product can be in the model's own dtype. Nothing is differentiated
with respect to weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prismaquant_ray.backward.price import (
    activation_projection,
    expert_traces,
    fisher_trace,
    half_squares,
    price,
    weight_change,
    weight_projection,
)
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.forward.decoded_candidates import CandidateDecoder, CandidateTensors, Decoded
from prismaquant_ray.layout import Block, BlockKind, LinearSpec, Matrix
from prismaquant_ray.model.capture import CapturedActivations
from prismaquant_ray.model.experts import Routing, grouped_product
from prismaquant_ray.records import BackwardRecord


@dataclass(slots=True, eq=False)
class _Priced:
    """One format of one fused group while microbatches arrive.

    Weights stay in BF16: float32 copies of every format would dominate memory. By microbatch,
    `squares` (sequences,) are ½ Σ p² of each sequence, and `parts` (2,) ½ Σ p² of rounded weights alone and of rounded
    activations alone. They stay on the device: reading them would make the host wait.
    """

    decoded: Decoded
    squares: list[Tensor] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)


class Passed(NamedTuple):
    """Gradients of the loss at a parameter: ∂L/∂x through it alone (…, I), and ∂L/∂y (…, O)."""

    at_input: Tensor
    at_output: Tensor


class Projections(NamedTuple):
    """p of every token (tokens,) by cause: rounded weights at exact inputs, and the addition of rounded inputs."""

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
        #: Whether `decoded.weights` are ΔW, formed once in the memory of Ŵ. A draft head needs Ŵ itself.
        self.changes = block.kind is not BlockKind.DRAFT and self._form_changes()

    def _form_changes(self) -> bool:
        """Whether ΔW has the type of Ŵ, and then could be formed in its place."""
        candidates = {
            id(weight): (weight, self.module.get_parameter(parameter))
            for formats in self.priced.values()
            for priced in formats.values()
            for parameter, weight in priced.decoded.weights.items()
        }
        if any(weight.dtype != source.dtype for weight, source in candidates.values()):
            return False
        for weight, source in candidates.values():
            weight.sub_(source)
        return True

    def add(self, captured: CapturedActivations, passed: Mapping[str, Passed], sequences: int) -> list[Tensor]:
        """Add a microbatch of `sequences`, with the gradients at every parameter; every p (tokens,), to be checked."""
        self._add_traces(captured, passed)
        found = []
        for (group, name), parts in self.projections(captured, passed).items():
            priced = self.priced[group][name]
            p = parts.weights + parts.activations
            priced.squares.append(half_squares(p.view(sequences, -1)))
            priced.parts.append(torch.stack([half_squares(part) for part in parts]))
            found.append(p)
        return found

    def projections(
        self, captured: CapturedActivations, passed: Mapping[str, Passed]
    ) -> dict[tuple[str, FormatName], Projections]:
        """p of every token of a microbatch, float32, by group and format, summed over the group's members.

        Tokens are in the microbatch's order, patches in a vision tower; rows of experts are summed by token.
        """
        found: dict[tuple[str, FormatName], Projections] = {}
        for entry in self.block.inputs:
            x, routing = _input(captured, entry.name)
            input_errors: dict[FormatName, Tensor] = {}
            for group, matrix in self.block.reading(entry):
                flat = {name: _flat(passed[name]) for name in matrix.parameters}
                grad_input = functools.reduce(torch.add, (at_input.float() for at_input, _ in flat.values()))
                for name, priced in self.priced[group.name].items():
                    rounding = FORMATS[name].round_activation
                    if rounding is not None and name not in input_errors:
                        input_errors[name] = rounding(x, priced.decoded.input_scales[matrix.parameters[0]]).sub_(x)
                    difference = functools.reduce(
                        torch.add,
                        (
                            self._product(g, priced.decoded.weights[parameter], parameter, routing)
                            for parameter, (_, g) in flat.items()
                        ),
                    )
                    weights = weight_projection(x, difference)
                    activations = (
                        activation_projection(input_errors[name], difference, grad_input)
                        if name in input_errors
                        else torch.zeros_like(weights)
                    )
                    parts = Projections(weights, activations)
                    parts = parts if routing is None else Projections(*(routing.to_tokens(part) for part in parts))
                    before = found.get((group.name, name))
                    found[group.name, name] = parts if before is None else Projections(*map(torch.add, before, parts))
        return found

    def _product(self, gradient: Tensor, candidate: Tensor, parameter: str, routing: Routing | None) -> Tensor:
        """D of a parameter (rows, I) float32, for g (rows, O); rows of experts one expert after the other."""
        if routing is None:
            return (gradient @ self._change(candidate, parameter)).float()
        if self.changes:
            return grouped_product(gradient, candidate.mT, routing.counts).float()
        # One expert at a time: a stack of float32 would take twice the memory of its candidate.
        weight, pieces = self.module.get_parameter(parameter), enumerate(gradient.split(routing.sizes))
        return torch.cat([g @ weight_change(candidate[at], weight[at]) for at, g in pieces if len(g)]).float()

    def _change(self, candidate: Tensor, parameter: str) -> Tensor:
        return candidate if self.changes else weight_change(candidate, self.module.get_parameter(parameter))

    def _add_traces(self, captured: CapturedActivations, passed: Mapping[str, Passed]) -> None:
        for entry in self.block.inputs:
            x, routing = _input(captured, entry.name)
            for _, matrix in self.block.reading(entry):
                for parameter in matrix.parameters:
                    self._add_trace(parameter, _flat(passed[parameter]).at_output.float(), x, routing)

    def _add_trace(self, parameter: str, gradient: Tensor, x: Tensor, routing: Routing | None) -> None:
        trace = fisher_trace(gradient, x) if routing is None else expert_traces(gradient, x, routing.counts)
        self.traces[parameter] += trace

    def finish(self, tokens: int) -> BackwardRecord:
        """Prices per token of `tokens`, and traces; InputError when no gradient reached the block."""
        groups = {
            group.name: {
                name: price(torch.cat(priced.squares).cpu(), torch.stack(priced.parts).cpu(), tokens)
                for name, priced in self.priced[group.name].items()
            }
            for group in self.block.groups
        }
        traces: dict[str, float | list[float]] = {}
        for group in self.block.groups:
            for matrix in group.matrices:
                for linear, channels in self._by_linear(matrix):
                    trace = channels.cpu()
                    if not bool(trace.any()):
                        raise InputError(
                            f"{linear.name}: its gradient is zero for every calibration token; it cannot be priced"
                        )
                    traces[linear.name] = (trace.sum(-1) / tokens).tolist()
        return BackwardRecord(groups=groups, fisher_trace=traces, tokens=tokens)

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


def _input(captured: CapturedActivations, name: str) -> tuple[Tensor, Routing | None]:
    """An input (rows, I) in float32, and the routing of its rows for experts."""
    return captured.inputs[name].detach().flatten(0, -2).float(), captured.routing.get(name)


def _flat(gradients: Passed) -> Passed:
    return Passed(*(g.flatten(0, -2) for g in gradients))
