"""One block of the forward pass: run it, gather its inputs' statistics, encode every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.calibration.dataset import Batch
from prismaquant_ray.copies import HostCopies
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formats.base import Codec, Tensors, experts_of
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.formats.nvfp4 import divisor
from prismaquant_ray.forward.encode import EncodedLinear, Rounding, encode_group
from prismaquant_ray.forward.gptq import HessianFactor
from prismaquant_ray.forward.routed_inputs import RoutedInputs
from prismaquant_ray.forward.statistics import InputStatistics, InputSums, divided
from prismaquant_ray.layout import Block, BlockKind, FusedGroup, InputGroup, LinearSpec, Matrix
from prismaquant_ray.model.capture import CapturedActivations, capture_activations
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.records import ForwardRecord, LinearRounding

# The divisor of an NVFP4 input allows for activations twice as large as in calibration: a divisor too small costs
# almost nothing over four octaves, one too large clips.
INPUT_MARGIN = 2.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockCandidates:
    """Every candidate of a block: `tensors[format]` maps shipped names to tensors; `record` explains them."""

    tensors: dict[FormatName, dict[str, Tensor]]
    record: ForwardRecord


class BlockForward:
    """A block while it is loaded for the forward pass. Microbatches must come in order, then `finish`.

    Without formats it is only run: nothing is gathered, and there is nothing to finish.
    """

    def __init__(self, runner: ModelRunner, index: int, formats: Sequence[FormatName], rounding: Rounding) -> None:
        self.runner = runner
        self.block: Block = runner.layout.blocks[index]
        self.module = runner.load_block(index)
        self.formats = tuple(formats)
        self.rounding = rounding
        self.dense: dict[str, InputSums] = {}
        self.routed: dict[str, RoutedInputs] = {}
        for group in self.block.inputs if formats else ():
            if group.experts is None:
                self.dense[group.name] = InputSums(group.in_features, runner.device)
        for fused in self.block.groups if formats else ():
            if fused.experts is not None:
                experts = self.module.get_submodule(fused.matrices[0].parameters[0].rpartition(".")[0])
                self.routed[fused.name] = RoutedInputs(experts, runner.device)

    @torch.no_grad()
    def run(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The block's output for hidden (sequences, tokens, H), or (patches, width) in the vision tower."""
        if self.block.kind is BlockKind.HEAD:
            # Logits would be the largest tensor of all, and nothing reads them.
            read = CapturedActivations()
            read.inputs[self.block.inputs[0].name] = self.runner.normed(hidden)
            self._gather(read, batch.holdout)
            return hidden
        with capture_activations(self.module, self.block) if self.formats else nullcontext() as captured:
            output = self.runner.run_block(self.block.index, self.module, hidden, batch.inputs)
        if captured is not None:
            self._gather(captured, batch.holdout)
        problem = f"{self.block.prefix} puts out NaN or infinite activations; is the checkpoint intact?"
        self.runner.checks.add(problem, output)
        return output

    def _gather(self, captured: CapturedActivations, held_out: Tensor) -> None:
        for name, sums in self.dense.items():
            # Rows are tokens of a sequence or patches of an image; `held_out` holds for all rows of one.
            x = captured.inputs[name].flatten(0, -2).unflatten(0, (len(held_out), -1))
            sums.add(*divided(x, held_out))
        for fused in self.block.groups:
            if fused.name in self.routed:
                rows, inner = (captured.inputs[matrix.input] for matrix in fused.matrices)
                routing = captured.routing[fused.matrices[0].input]
                self.routed[fused.name].add(rows, inner, routing, held_out)

    @torch.no_grad()
    def finish(self) -> BlockCandidates:
        """Encode every fused group in every format it can take."""
        found = _Encoded(self.formats, self.runner.device)
        for group in self.block.inputs:
            if group.experts is None:
                self._finish_dense(group, self.dense.pop(group.name).statistics(), found)
        experts: dict[str, list[int]] = {}
        for fused in self.block.groups:
            if fused.name in self.routed:
                routed = self.routed.pop(fused.name)
                experts[fused.name] = routed.tokens_of.tolist()
                for chunk in routed.chunks():
                    at = slice(chunk.start, chunk.stop)
                    for matrix in fused.matrices:
                        statistics = chunk.statistics[matrix.parameters[0].rpartition(".")[2]]
                        factor = self.rounding.factor(statistics)
                        weights = [weight[at] for weight in self._weights(matrix)]
                        self._encode(fused, matrix, weights, statistics, factor, found, at)
        found.copies.wait()
        return BlockCandidates(tensors=found.tensors, record=ForwardRecord(linears=found.linears, experts=experts))

    def _finish_dense(self, group: InputGroup, statistics: InputStatistics, found: _Encoded) -> None:
        factor = self.rounding.factor(statistics)
        for fused, matrix in self.block.reading(group):
            self._encode(fused, matrix, self._weights(matrix), statistics, factor, found, slice(0, 1))

    def _encode(
        self,
        fused: FusedGroup,
        matrix: Matrix,
        weights: Sequence[Tensor],
        statistics: InputStatistics,
        factor: HessianFactor | None,
        found: _Encoded,
        at: slice,
    ) -> None:
        """Round a matrix, or that of the experts `at`, by every codec that its group can take."""
        for codec in codecs_of(formats_of(fused, self.formats)).values():
            results = encode_group(weights, codec, statistics, factor, self.rounding)
            for linear, result in zip(matrix.linears, results, strict=True):
                found.add(linear, codec, result, statistics.amax, at)

    def _weights(self, matrix: Matrix) -> list[Tensor]:
        """Its Linears' weights (O, I), or (E, O, I) of every expert."""
        if matrix.experts is None:
            return [self.module.get_parameter(name) for name in matrix.parameters]
        packed = self.module.get_parameter(matrix.parameters[0])
        return [packed[:, rows] for rows in matrix.rows]


class _Encoded:
    """Candidates and figures of a block, added Linear by Linear."""

    def __init__(self, formats: Sequence[FormatName], device: torch.device) -> None:
        self.copies = HostCopies(device)
        self.tensors: dict[FormatName, Tensors] = {name: {} for name in formats if FORMATS[name].codec is not None}
        self.linears: dict[str, dict[str, LinearRounding]] = {}

    def add(self, linear: LinearSpec, codec: Codec, result: EncodedLinear, amax: float, at: slice) -> None:
        """A Linear, or the same one of the experts `at`."""
        # Device memory is kept for the weights that are still to be rounded; a stack is copied at once.
        packed = {suffix: self.copies.take(tensor) for suffix, tensor in codec.pack(result.rounded).items()}
        each = [packed] if linear.experts is None else experts_of(packed)
        for name, found in self.tensors.items():
            if FORMATS[name].codec is not codec:
                continue
            for module, tensors in zip(linear.names[at], each, strict=True):
                found.update({f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()})
                if FORMATS[name].static_input_scale:
                    # One value for all experts of a layer, because the runtime applies one to all.
                    found[f"{module}.input_global_scale"] = divisor(amax, INPUT_MARGIN)
        by_codec = self.linears.setdefault(linear.name, {})
        before, figures = by_codec.get(codec.name), result.figures
        by_codec[codec.name] = figures if before is None else LinearRounding.joined([before, figures])


def hessian_bytes(group: InputGroup) -> int:
    """Training and held-out Hessian of one input group, float32; experts share theirs until the block is finished."""
    return 2 * 4 * group.in_features**2
