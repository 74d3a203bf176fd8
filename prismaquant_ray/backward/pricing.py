"""Pricing every candidate of a block while its gradients go by.

Each format costs one matrix product per parameter, D = g ΔW with ΔW = Ŵ − W. `price.weight_projection` and
`price.activation_projection` derive both parts of the error from it, because g W is known: it is the gradient with
respect to x. No large numbers are subtracted, so the product can be in the model's own dtype. Nothing is differentiated
with respect to weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prismaquant_ray.backward.price import (
    Split,
    expert_traces,
    fisher_trace,
    input_error,
    price,
    projections,
    rounded_projections,
    sums_of_squares,
    weight_change,
)
from prismaquant_ray.block_records import BackwardRecord, Price
from prismaquant_ray.copies import DeviceCopies
from prismaquant_ray.errors import InputError
from prismaquant_ray.factors import NO_FACTORS, Factors
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.forward.decoded_candidates import CandidateDecoder, CandidateTensors, Decoded
from prismaquant_ray.layout import Block, BlockKind, InputGroup, LinearSpec, Matrix
from prismaquant_ray.model.capture import CapturedActivations
from prismaquant_ray.model.experts import Routing, grouped_product


class Passed(NamedTuple):
    """Gradients of the loss at a parameter: ∂L/∂x through it alone (…, I), and ∂L/∂y (…, O)."""

    at_input: Tensor
    at_output: Tensor


class Pricing:
    """Prices of a block's candidates, added up microbatch by microbatch.

    Candidates stay in BF16: float32 copies of every format would dominate memory. What is added up stays on the device:
    reading it would make the host wait.
    """

    def __init__(
        self,
        block: Block,
        module: nn.Module,
        formats: Sequence[FormatName],
        candidates: CandidateTensors,
        copies: DeviceCopies,
        factors: Mapping[str, Factors] = NO_FACTORS,
    ) -> None:
        self.block = block
        self.module = module
        # Of folds that candidates were made with: what is priced is their effect on the source.
        self.factors = {name: each.to(copies.device) for name, each in factors.items()}
        self.traces: dict[str, Tensor] = {
            parameter: torch.zeros(*_channels(matrix, parameter), device=copies.device)
            for group in block.groups
            for matrix in group.matrices
            for parameter in matrix.parameters
        }
        decoder = CandidateDecoder(candidates, copies)
        self.decoded: dict[str, dict[FormatName, Decoded]] = {
            group.name: {
                name: decoder.decode(group, name)
                for name in formats_of(group, formats)
                if FORMATS[name].codec is not None
            }
            for group in block.groups
        }
        # By microbatch, of every (group, format): Σ p² of each sequence (formats, 3, sequences), of both roundings, of
        # rounded weights alone and of rounded activations alone.
        self._squares: list[Tensor] = []
        self._holdout: list[Tensor] = []
        #: Whether `decoded` has ΔW, formed once in the memory of Ŵ. A draft head needs Ŵ itself.
        self.changes = block.kind is not BlockKind.DRAFT and self._form_changes()

    def _form_changes(self) -> bool:
        """Whether ΔW has the type of Ŵ, and then could be formed in its place."""
        candidates = {
            id(weight): (weight, self.module.get_parameter(parameter), parameter)
            for formats in self.decoded.values()
            for decoded in formats.values()
            for parameter, weight in decoded.weights.items()
        }
        if any(weight.dtype != source.dtype for weight, source, _ in candidates.values()):
            return False
        for weight, source, parameter in candidates.values():
            if parameter in self.factors:
                weight.copy_(self.factors[parameter].change(weight, source))
            else:
                weight.sub_(source)
        return True

    def unfolded(self, candidate: Tensor, parameter: str) -> Tensor:
        """What the runtime's weight is to the source: float32 where it was folded."""
        return self.factors[parameter].undo(candidate) if parameter in self.factors else candidate

    def add(self, captured: CapturedActivations, passed: Mapping[str, Passed], holdout: Tensor) -> Tensor | None:
        """Add a microbatch, with the gradients at every parameter; `holdout` (sequences,) marks those held out.

        Returns p (formats, tokens) of everything that was priced, to be checked; None where nothing was.
        """
        self._add_traces(captured, passed)
        found = self.projections(captured, passed)
        if not found:
            return None
        parts = torch.stack([*found.values()])
        p = parts[:, 0] + parts[:, 1]
        both = torch.cat([p.unsqueeze(1), parts], dim=1)
        self._squares.append(sums_of_squares(both.unflatten(-1, (len(holdout), -1))))
        self._holdout.append(holdout)
        return p

    def projections(
        self, captured: CapturedActivations, passed: Mapping[str, Passed]
    ) -> dict[tuple[str, FormatName], Tensor]:
        """Both parts of p of every token of a microbatch (2, tokens), float32, summed over the group's members.

        By group and format, in this order. Tokens are in the microbatch's order, patches in a vision tower; rows of
        experts are summed by token.
        """
        found: dict[tuple[str, FormatName], Tensor] = {}
        for entry in self.block.inputs:
            captured_x, routing = captured.inputs[entry.name].detach().flatten(0, -2), captured.routing.get(entry.name)
            s = self._divisors(entry, routing)
            x = captured_x.float() if s is None else captured_x / s
            input_errors: dict[FormatName, Tensor | None] = {}
            for group, matrix in self.block.reading(entry):
                flat = {name: _flat(passed[name]) for name in matrix.parameters}
                at_inputs = (each.at_input.float() if s is None else each.at_input * s for each in flat.values())
                grad_input = functools.reduce(torch.add, at_inputs)
                for name, decoded in self.decoded[group.name].items():
                    scale = decoded.input_scales[matrix.parameters[0]]
                    products = (
                        self._product(gradient, decoded.weights[parameter], parameter, routing)
                        for parameter, (_, gradient) in flat.items()
                    )
                    difference = functools.reduce(torch.add, products)
                    if x.is_cpu or not FORMATS[name].has_kernel:
                        if name not in input_errors:
                            input_errors[name] = input_error(x, scale, name)
                        parts = projections(x, difference, grad_input, input_errors[name])
                    else:
                        parts = rounded_projections(x, difference, grad_input, scale, name)
                    parts = parts if routing is None else routing.to_tokens(parts, dim=1)
                    key = (group.name, name)
                    found[key] = found[key] + parts if key in found else parts
        return {
            (group.name, name): found[group.name, name]
            for group in self.block.groups
            for name in self.decoded[group.name]
        }

    def _product(self, gradient: Tensor, candidate: Tensor, parameter: str, routing: Routing | None) -> Tensor:
        """D of a parameter (rows, I) float32, for g (rows, O) and the input that its candidates read.

        Rows of experts one expert after the other.
        """
        if routing is None:
            return (gradient @ self._change(candidate, parameter)).float()
        if self.changes:
            return grouped_product(gradient, candidate.mT, routing.ends).float()
        # One expert at a time: a stack of float32 would take twice the memory of its candidate.
        pieces = enumerate(gradient.split(routing.sizes))
        return torch.cat([g @ self._change(candidate, parameter, at) for at, g in pieces if len(g)]).float()

    def _change(self, candidate: Tensor, parameter: str, expert: int | None = None) -> Tensor:
        """ΔW of a parameter, or of an expert in it, for the input that its candidates read."""
        if self.changes:
            return candidate
        weight: Tensor = self.module.get_parameter(parameter)
        factors = self.factors.get(parameter)
        if expert is not None:
            candidate, weight = candidate[expert], weight[expert]
            factors = None if factors is None else factors.of(expert)
        return weight_change(candidate, weight) if factors is None else factors.change(candidate, weight)

    def _divisors(self, entry: InputGroup, routing: Routing | None) -> Tensor | None:
        """What an input is divided by (I,), or every row of it (R, I)."""
        factors = self.factors.get(entry.matrices[0].parameters[0])
        if factors is None or factors.columns is None or factors.columns.dim() == 1:
            return None if factors is None else factors.columns
        assert routing is not None
        return factors.columns[routing.expert]

    def _add_traces(self, captured: CapturedActivations, passed: Mapping[str, Passed]) -> None:
        for entry in self.block.inputs:
            x, routing = _input(captured, entry.name)
            for _, matrix in self.block.reading(entry):
                for parameter in matrix.parameters:
                    self._add_trace(parameter, _flat(passed[parameter]).at_output.float(), x, routing)

    def _add_trace(self, parameter: str, gradient: Tensor, x: Tensor, routing: Routing | None) -> None:
        trace = fisher_trace(gradient, x) if routing is None else expert_traces(gradient, x, routing.own)
        self.traces[parameter] += trace

    def finish(self, split: Split) -> BackwardRecord:
        """Prices per token, and traces; InputError when no gradient reached the block."""
        groups: dict[str, dict[FormatName, Price]] = {group.name: {} for group in self.block.groups}
        if self._squares:
            squares, holdout = torch.cat(self._squares, dim=-1).cpu() / 2, torch.cat(self._holdout)
            keys = [(group, name) for group, formats in self.decoded.items() for name in formats]
            for (group, name), each in zip(keys, squares, strict=True):
                groups[group][name] = price(each, holdout, split)
        traces: dict[str, float | list[float]] = {}
        reached = False
        for linear, trace in self._traces_by_linear():
            # A Linear alone may have no effect, as beside an output projection of zeros: then every format is free.
            reached = reached or bool(trace.any())
            traces[linear.name] = (trace.sum(-1) / split.tokens).tolist()
        if not reached:
            raise InputError(
                f"{self.block.prefix or self.block.groups[0].name}: no gradient reaches it for any calibration token; "
                "it cannot be priced"
            )
        return BackwardRecord(
            groups=groups, fisher_trace=traces, tokens=split.tokens, held_out_tokens=split.held_out_tokens
        )

    def _traces_by_linear(self) -> Iterator[tuple[LinearSpec, Tensor]]:
        """Each Linear's trace by output channel (O,), or (E, O), on the CPU."""
        # One copy of all.
        flat = torch.cat([trace.flatten() for trace in self.traces.values()]).cpu()
        pieces = flat.split([trace.numel() for trace in self.traces.values()])
        traces = {name: piece.view_as(trace) for (name, trace), piece in zip(self.traces.items(), pieces, strict=True)}
        for group in self.block.groups:
            for matrix in group.matrices:
                if matrix.experts is None:
                    yield from zip(matrix.linears, (traces[name] for name in matrix.parameters), strict=True)
                    continue
                packed = traces[matrix.parameters[0]]
                yield from zip(matrix.linears, (packed[:, rows].contiguous() for rows in matrix.rows), strict=True)


def _channels(matrix: Matrix, parameter: str) -> tuple[int, ...]:
    if matrix.experts is not None:
        return (matrix.experts, matrix.rows[-1].stop)
    return (matrix.linears[matrix.parameters.index(parameter)].out_features,)


def _input(captured: CapturedActivations, name: str) -> tuple[Tensor, Routing | None]:
    """An input (rows, I) in float32, and the routing of its rows for experts."""
    return captured.inputs[name].detach().flatten(0, -2).float(), captured.routing.get(name)


def _flat(gradients: Passed) -> Passed:
    return Passed(*(g.flatten(0, -2) for g in gradients))
