"""One block of the forward pass: run it, gather its inputs' statistics, encode every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, Codec, FormatName, codecs_of
from prismaquant_ray.formats.nvfp4 import divisor
from prismaquant_ray.layout import Block, FusedGroup, InputGroup
from prismaquant_ray.models.runner import ModelRunner
from prismaquant_ray.models.taps import tapped
from prismaquant_ray.rounding.encode import EncodedLinear, Rounding, encode_group
from prismaquant_ray.rounding.hessian import InputStatistics

# The divisor of an NVFP4 input allows activations twice as large as any calibration token showed: too small a
# divisor costs almost nothing over four octaves, too large a one clips.
INPUT_MARGIN = 2.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockCandidates:
    """Every candidate of a block: `tensors[format]` maps shipped names to tensors; `figures` explains them."""

    tensors: dict[FormatName, dict[str, Tensor]]
    figures: dict[str, Any]


class ForwardVisit:
    """A block while it is loaded for the forward pass. Microbatches must come in order, then `finish`.

    Without formats it is only run: nothing is gathered, and there is nothing to finish.
    """

    def __init__(self, runner: ModelRunner, index: int, formats: Sequence[FormatName], rounding: Rounding) -> None:
        self.runner = runner
        self.block: Block = runner.layout.blocks[index]
        self.module = runner.load_block(index)
        self.formats = tuple(formats)
        self.rounding = rounding
        self.statistics = {
            group.name: InputStatistics.empty(group.in_features, runner.device)
            for group in (self.block.inputs if formats else ())
        }

    @torch.no_grad()
    def run(self, hidden: Tensor, held_out: Tensor) -> Tensor:
        """What leaves the block for hidden (sequences, tokens, H); `held_out` (sequences,) marks acceptance data."""
        with tapped(self.module, self.block) if self.formats else nullcontext() as taps:
            output = self.runner.run_block(self.block.index, self.module, hidden)
        for name, x in taps.inputs.items() if taps else ():
            self.statistics[name] = self.statistics[name].plus(x, held_out)
        if not bool(torch.isfinite(output).all()):
            raise InputError(f"{self.block.prefix} puts out NaN or infinite activations; is the checkpoint intact?")
        return output

    @torch.no_grad()
    def finish(self) -> BlockCandidates:
        """Encode every fused group in every format it can take."""
        tensors: dict[FormatName, dict[str, Tensor]] = {
            name: {} for name in self.formats if FORMATS[name].codec is not None
        }
        linears: dict[str, dict[str, Any]] = {}
        for group in self.block.inputs:
            statistics = self.statistics.pop(group.name)
            factor = self.rounding.factor(statistics)
            for fused in group.groups:
                weights = [self._weight(linear.name) for linear in fused.linears]
                for codec in codecs_of(formats_of(fused, self.formats)).values():
                    encoded = encode_group(weights, codec, statistics, factor, self.rounding)
                    for linear, result in zip(fused.linears, encoded, strict=True):
                        linears.setdefault(linear.name, {})[codec.name] = _figures(result)
                        self._collect(tensors, linear.name, codec, result, statistics)
        return BlockCandidates(tensors=tensors, figures={"linears": linears})

    def _weight(self, name: str) -> Tensor:
        linear = self.module.get_submodule(name[len(self.block.prefix) + 1 :])
        assert isinstance(linear, nn.Linear)
        return linear.weight

    def _collect(
        self,
        tensors: Mapping[FormatName, dict[str, Tensor]],
        linear: str,
        codec: Codec,
        result: EncodedLinear,
        statistics: InputStatistics,
    ) -> None:
        packed = codec.pack(result.rounded)
        for name, found in tensors.items():
            if FORMATS[name].codec is not codec:
                continue
            found.update({f"{linear}.{suffix}": tensor for suffix, tensor in packed.items()})
            if FORMATS[name].static_input_scale:
                found[f"{linear}.input_global_scale"] = divisor(statistics.amax, INPUT_MARGIN)


def formats_of(fused: FusedGroup, formats: Sequence[FormatName]) -> tuple[FormatName, ...]:
    """The formats, in the given order, that every member of a fused group can take."""
    return tuple(name for name in formats if FORMATS[name].group_refusal(fused.linears) is None)


def hessian_bytes(group: InputGroup) -> int:
    """Training and held-out Hessian of one input group, float32."""
    return 2 * 4 * group.in_features**2


def _figures(result: EncodedLinear) -> dict[str, Any]:
    return {
        "method": result.method,
        "holdout_error": result.holdout_error,
        "weight_mse": result.weight_mse,
        "output_mse": result.output_mse,
    }
