"""One block of the backward pass: recompute it, take output gradients, price every candidate.

Nothing is differentiated with respect to weights; one matrix product per Linear and codec is all a format adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Block, FusedGroup
from prismaquant_ray.models.runner import ModelRunner
from prismaquant_ray.models.taps import Taps, tapped
from prismaquant_ray.rounding.forward_pass import formats_of
from prismaquant_ray.sensitivity.cost import fisher_trace, price, projected_error

CandidateTensors = Mapping[FormatName, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockSensitivity:
    """What the backward pass learned of a block.

    `vectors` holds p (sequences, tokens) float32 under "group|format" and the channel traces (O,) under
    "linear|trace"; `figures` holds prices and traces for the record.
    """

    vectors: dict[str, Tensor]
    figures: dict[str, Any]


@dataclass(kw_only=True, slots=True, eq=False)
class _Priced:
    """One format of one fused group while microbatches arrive."""

    weights: dict[str, Tensor]
    input_scale: Tensor | None
    p: list[Tensor]
    squared_error: dict[str, float]


class BackwardVisit:
    """A block while it is loaded for the backward pass.

    Microbatches must come in order, `forward` then `backward` for each, then `finish`. Without formats it only passes
    gradients on, and there is nothing to finish.
    """

    def __init__(
        self, runner: ModelRunner, index: int, formats: Sequence[FormatName], candidates: CandidateTensors
    ) -> None:
        self.runner = runner
        self.block: Block = runner.layout.blocks[index]
        self.module = runner.load_block(index)
        self.formats = tuple(formats)
        self.tokens = 0
        self._graph: tuple[Tensor, Tensor, Taps] | None = None
        self.traces: dict[str, Tensor] = {
            linear.name: torch.zeros(linear.out_features, device=runner.device) for linear in self.block.linears
        }
        decoded: dict[tuple[str, str], Tensor] = {}
        self.priced: dict[str, dict[FormatName, _Priced]] = {
            group.name: {
                name: self._decode(group, name, candidates[name], decoded)
                for name in formats_of(group, formats)
                if FORMATS[name].codec is not None
            }
            for group in self.block.groups
        }

    def _decode(
        self, group: FusedGroup, name: FormatName, tensors: Mapping[str, Tensor], decoded: dict[tuple[str, str], Tensor]
    ) -> _Priced:
        codec = FORMATS[name].codec
        assert codec is not None
        for linear in group.linears:
            key = (linear.name, codec.name)
            if key not in decoded:
                prefix = f"{linear.name}."
                own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                decoded[key] = codec.decode(own).to(device=self.runner.device, dtype=torch.float32)
        scale = tensors.get(f"{group.linears[0].name}.input_global_scale")
        return _Priced(
            weights={linear.name: decoded[linear.name, codec.name] for linear in group.linears},
            input_scale=None if scale is None else scale.to(self.runner.device),
            p=[],
            squared_error={linear.name: 0.0 for linear in group.linears},
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """What leaves the block for hidden (sequences, tokens, H); its graph is held until `backward`."""
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), tapped(self.module, self.block) as taps:
            output = self.runner.run_block(self.block.index, self.module, hidden)
        self._graph = hidden, output, taps
        return output.detach()

    def backward(self, grad_output: Tensor) -> Tensor:
        """∂L/∂hidden for ∂L/∂output, both (sequences, tokens, H); prices every candidate on the way."""
        assert self._graph is not None, "forward comes first"
        (hidden, output, taps), self._graph = self._graph, None
        names = list(taps.outputs)
        gradients = torch.autograd.grad(output, [hidden, *taps.outputs.values()], grad_output)
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise InputError(f"{self.block.prefix} has NaN or infinite gradients; is the checkpoint intact?")
        if self.formats:
            with torch.no_grad():
                self._price(taps, dict(zip(names, gradients[1:], strict=True)))
        self.tokens += hidden.shape[0] * hidden.shape[1]
        return gradients[0]

    def _price(self, taps: Taps, gradients: Mapping[str, Tensor]) -> None:
        for group in self.block.inputs:
            x = taps.inputs[group.name].detach()
            sequences = x.shape[0]
            rows = x.flatten(0, 1).float()
            rounded: dict[FormatName, Tensor] = {}
            for fused in group.groups:
                grads = {linear.name: gradients[linear.name].flatten(0, 1).float() for linear in fused.linears}
                clean = {linear.name: self._product(linear.name, taps, rows) for linear in fused.linears}
                for linear in fused.linears:
                    self.traces[linear.name] += fisher_trace(grads[linear.name], rows)
                for name, priced in self.priced[fused.name].items():
                    if name not in rounded:
                        rounding = FORMATS[name].round_activation
                        rounded[name] = (
                            rows if rounding is None else rounding(rows.float(), priced.input_scale).to(rows.dtype)
                        )
                    p = torch.zeros(rows.shape[0], device=rows.device)
                    for linear in fused.linears:
                        error = (rounded[name] @ priced.weights[linear.name].T).sub_(clean[linear.name])
                        p += projected_error(grads[linear.name], error)
                        priced.squared_error[linear.name] += float(error.square().sum())
                    priced.p.append(p.view(sequences, -1))

    def _product(self, name: str, taps: Taps, x: Tensor) -> Tensor:
        """x Wᵀ (tokens, O) in float32: the Linear's own output without its bias, unless that has fewer bits."""
        linear = self.module.get_submodule(name[len(self.block.prefix) + 1 :])
        assert isinstance(linear, nn.Linear)
        output = taps.outputs[name].detach().flatten(0, 1)
        if output.dtype != torch.float32:
            return x @ linear.weight.float().T
        return output if linear.bias is None else output - linear.bias

    def finish(self) -> BlockSensitivity:
        """Prices, traces and p vectors over every microbatch; InputError when no gradient reached the block."""
        vectors: dict[str, Tensor] = {}
        groups: dict[str, Any] = {}
        outputs: dict[str, dict[str, float]] = {}
        for fused in self.block.groups:
            groups[fused.name] = {}
            for name, priced in self.priced[fused.name].items():
                p = torch.cat(priced.p)
                vectors[f"{fused.name}|{name}"] = p
                cost = price(p)
                groups[fused.name][name] = {
                    "cost": cost.cost,
                    "first_order": cost.first_order,
                    "standard_error": cost.standard_error,
                }
                for linear in fused.linears:
                    mean = priced.squared_error[linear.name] / (self.tokens * linear.out_features)
                    outputs.setdefault(linear.name, {})[name] = mean
        traces = {name: float(trace.sum()) / self.tokens for name, trace in self.traces.items()}
        dead = next((name for name, trace in traces.items() if trace == 0.0), None)
        if dead is not None:
            raise InputError(f"{dead}: its gradient is zero for every calibration token; it cannot be priced")
        vectors.update({f"{name}|trace": trace for name, trace in self.traces.items()})
        return BlockSensitivity(
            vectors=vectors,
            figures={"groups": groups, "fisher_trace": traces, "output_mse": outputs, "tokens": self.tokens},
        )
