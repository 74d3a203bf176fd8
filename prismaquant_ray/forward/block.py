"""One block of the forward pass: run it, gather its inputs' statistics, encode every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import vector_norm

from prismaquant_ray.block_records import CacheScales, ForwardRecord, LinearRounding
from prismaquant_ray.cache_rounding import cache_scales
from prismaquant_ray.calibration.dataset import Batch
from prismaquant_ray.copies import HostCopies
from prismaquant_ray.fold import Fold
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formats.base import Codec, Tensors, experts_of
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.formats.fp8_block import CODEC as FP8_BLOCK
from prismaquant_ray.formats.nvfp4 import input_divisor
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE
from prismaquant_ray.forward.block_folds import BlockFolds
from prismaquant_ray.forward.encode import EncodedLinear, Rounding, encode_group
from prismaquant_ray.forward.equalize import Reading, judged_by
from prismaquant_ray.forward.gptq import HessianFactor
from prismaquant_ray.forward.kept_rows import KeptRows
from prismaquant_ray.forward.passed_blocks import kept_parameters, passed_scales
from prismaquant_ray.forward.routed_inputs import RoutedInputs
from prismaquant_ray.forward.statistics import InputStatistics, InputSums, divided
from prismaquant_ray.layout import Block, BlockKind, CachedAttention, FusedGroup, InputGroup, LinearSpec, Matrix
from prismaquant_ray.model.capture import CapturedActivations, capture_activations
from prismaquant_ray.model.runner import ModelRunner

_ONE = slice(0, 1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockCandidates:
    """Every candidate of a block: `tensors[format]` maps shipped names to tensors; `record` explains them.

    `factors` are those of the record's folds, by their number.
    """

    tensors: dict[FormatName, dict[str, Tensor]]
    factors: dict[str, Tensor]
    record: ForwardRecord


class BlockForward:
    """A block while it is loaded for the forward pass. Microbatches must come in order, then `finish`.

    Without formats it is only run: nothing is gathered, and there is nothing to finish.
    """

    def __init__(
        self,
        runner: ModelRunner,
        index: int,
        formats: Sequence[FormatName],
        rounding: Rounding,
        *,
        equalize: bool = False,
    ) -> None:
        self.runner = runner
        self.block: Block = runner.layout.blocks[index]
        self.module = runner.load_block(index)
        self.formats = tuple(formats)
        self.rounding = rounding
        self.dense: dict[str, InputSums] = {}
        self.routed: dict[str, RoutedInputs] = {}
        # By attention and microbatch: max |k| (), and |v| of every channel (heads · size,).
        self.cached: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for group in self.block.inputs if formats else ():
            if group.experts is None:
                self.dense[group.name] = InputSums(group.in_features, runner.device)
        for fused in self.block.groups if formats else ():
            if fused.experts is not None:
                experts = self.module.get_submodule(fused.matrices[0].parameters[0].rpartition(".")[0])
                self.routed[fused.name] = RoutedInputs(experts, runner.device)
        # Nothing is folded into what the head reads: its norm is the model's.
        equalize = equalize and self.block.kind is not BlockKind.HEAD
        self.judge = judged_by(formats) if equalize else None
        self.kept = {name: KeptRows() for name in self.dense} if self.judge else {}
        # Parameters that no factors may change, and the scales under which weights pass through.
        self.unchanged = kept_parameters(runner.checkpoint, self.block, self.formats)
        self._passed: dict[str, list[Tensor] | None] = {}
        #: The folds of the block; None before it ran.
        self.folds: tuple[Fold, ...] | None = None if self.judge else ()

    @torch.no_grad()
    def run(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The block's output for hidden (sequences, tokens, H), or (patches, width) in the vision tower."""
        if self.block.kind is BlockKind.HEAD:
            # Logits would be the largest tensor of all, and nothing reads them.
            read = CapturedActivations()
            read.inputs[self.block.inputs[0].name] = self.runner.normed(hidden)
            self._gather(read, batch.holdout)
            return hidden
        if self.folds is None:
            found = self.runner.folds(self.block.index, self.module, hidden, batch.inputs)
            self.folds = tuple(fold for fold in found if self.unchanged.isdisjoint(fold.parameters))
        with capture_activations(self.module, self.block) if self.formats else nullcontext() as captured:
            output = self.runner.run_block(self.block.index, self.module, hidden, batch.inputs)
        if captured is not None:
            self._gather(captured, batch.holdout)
        problem = f"{self.block.prefix} puts out NaN or infinite activations; is the checkpoint intact?"
        self.runner.checks.add(problem, output)
        return output

    def _gather(self, captured: CapturedActivations, held_out: Tensor) -> None:
        for name, (key, value) in captured.cached.items():
            # Largest absolute values, by one kernel each.
            largest = vector_norm(key, torch.inf), vector_norm(value, torch.inf, (0, 2)).flatten()
            self.cached.setdefault(name, []).append(largest)
        for name, sums in self.dense.items():
            # Rows are tokens of a sequence or patches of an image; `held_out` holds for all rows of one.
            x = captured.inputs[name].flatten(0, -2).unflatten(0, (len(held_out), -1))
            parts = divided(x, held_out)
            sums.add(*parts)
            if name in self.kept:
                self.kept[name].add(parts, x.shape[1])
        for fused in self.block.groups:
            if fused.name in self.routed:
                rows, inner = (captured.inputs[matrix.input] for matrix in fused.matrices)
                routing = captured.routing[fused.matrices[0].input]
                self.routed[fused.name].add(rows, inner, routing, held_out)

    @torch.no_grad()
    def finish(self) -> BlockCandidates:
        """Encode every fused group in every format it can take, after its inputs were equalized."""
        found = _Encoded(self.formats, self.runner.device)
        statistics = {name: sums.statistics() for name, sums in self.dense.items()}
        self.dense.clear()
        folds = self._folds(statistics)
        for group in self.block.inputs:
            if group.experts is None:
                self._finish_dense(group, statistics.pop(group.name), folds, found)
        experts: dict[str, list[int]] = {}
        for fused in self.block.groups:
            if fused.name in self.routed:
                routed = self.routed.pop(fused.name)
                experts[fused.name] = routed.tokens_of.tolist()
                self._finish_experts(fused, routed, folds, found)
        found.copies.wait()
        record = ForwardRecord(
            linears=found.linears,
            experts=experts,
            folds=[fold for fold, _ in folds.chosen],
            storing=folds.storing(),
            cache={each.name: self._cache_scales(each, folds) for each in self._seen()},
        )
        factors = {str(index): s.cpu().contiguous() for index, (_, s) in enumerate(folds.chosen)}
        return BlockCandidates(tensors=found.tensors, factors=factors, record=record)

    def _cache_scales(self, attention: CachedAttention, folds: BlockFolds) -> CacheScales:
        key, value = (torch.stack(each).amax(0).float() for each in zip(*self.cached[attention.name], strict=True))
        return cache_scales(attention, key, value, folds.chosen)

    def _seen(self) -> list[CachedAttention]:
        """The attentions that ran."""
        return [each for each in self.block.attention if each.name in self.cached]

    def _folds(self, statistics: Mapping[str, InputStatistics]) -> BlockFolds:
        """The folds of the block, with the factors of all that are not those of experts."""
        folds = BlockFolds(
            module=self.module,
            stored=self.runner.stored_types(self.block.index),
            quantizable={name for group in self.block.groups for each in group.matrices for name in each.parameters},
            folds=self.folds or (),
            rounding=self.judge,
        )
        for fold in folds.folds:
            group = next((each for each in self.block.inputs if folds.of(each) is fold), None)
            if group is None or fold.experts is not None:
                continue  # nothing that may be quantized reads it; or each expert has its own
            if group.experts is None:
                of_input, rows = statistics[group.name], self.kept[group.name].rows()
            else:
                fused, _ = self.block.reading(group)[0]
                of_input, rows = self.routed[fused.name].hidden()
            reading = Reading(
                importance=of_input.importance.unsqueeze(0),
                amax=of_input.amax.unsqueeze(0),
                rows=rows,
                expert=torch.zeros(len(rows), dtype=torch.int64, device=rows.device),
                weights=folds.readers(fold),
            )
            s = folds.choose(fold, reading)
            if s is not None:
                folds.keep(fold, s)
        return folds

    def _finish_dense(self, group: InputGroup, statistics: InputStatistics, folds: BlockFolds, found: _Encoded) -> None:
        s = folds.columns(group)
        statistics = statistics if s is None else statistics.divided_by(s)
        factor = self.rounding.factor(statistics)
        for fused, matrix in self.block.reading(group):
            self._encode(fused, matrix, folds.weights(matrix, _ONE), statistics, factor, found, _ONE)
        found.calibrate(group.name, statistics.largest)

    def _finish_experts(self, fused: FusedGroup, routed: RoutedInputs, folds: BlockFolds, found: _Encoded) -> None:
        groups = {matrix.name: group for group in self.block.inputs for matrix in group.matrices}
        own = folds.of(groups[fused.matrices[1].name])
        parts: list[Tensor] = []
        equalized = False
        largest: dict[str, float] = {}
        for chunk in routed.chunks():
            at, more = slice(chunk.start, chunk.stop), []
            if own is not None:
                s = folds.choose(own, replace(chunk.inner, weights=folds.readers(own, at)))
                equalized = equalized or s is not None
                parts.append(torch.ones_like(chunk.inner.amax) if s is None else s)
                more = [(own, parts[-1])]
            for matrix in fused.matrices:
                statistics = chunk.statistics[matrix.parameters[0].rpartition(".")[2]]
                s = folds.columns(groups[matrix.name], more)
                statistics = statistics if s is None else statistics.divided_by(s)
                largest[matrix.input] = max(largest.get(matrix.input, 0.0), statistics.largest)
                factor = self.rounding.factor(statistics)
                self._encode(fused, matrix, folds.weights(matrix, at, more), statistics, factor, found, at)
        if own is not None and equalized:
            folds.keep(own, torch.cat(parts))
        for name, amax in largest.items():
            # One value for all experts of a layer, because the runtime applies one to all.
            found.calibrate(name, amax)

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
            given = self._scales(matrix, at) if codec is FP8_BLOCK else None
            results = encode_group(weights, codec, statistics, factor, self.rounding, given)
            for linear, result in zip(matrix.linears, results, strict=True):
                found.add(linear, codec, result, matrix.input, at)

    def _scales(self, matrix: Matrix, at: slice) -> list[Tensor] | None:
        """The source's scales under which a matrix, or that of the experts `at`, passes through; None without."""
        if matrix.name not in self._passed:
            self._passed[matrix.name] = passed_scales(self.runner.checkpoint, matrix)
        found = self._passed[matrix.name]
        if found is None:
            return None
        return [(scale if matrix.experts is None else scale[at]).to(self.runner.device) for scale in found]


class _Encoded:
    """Candidates and figures of a block, added Linear by Linear."""

    def __init__(self, formats: Sequence[FormatName], device: torch.device) -> None:
        self.copies = HostCopies(device)
        self.tensors: dict[FormatName, Tensors] = {name: {} for name in formats if FORMATS[name].codec is not None}
        self.linears: dict[str, dict[str, LinearRounding]] = {}
        # Where the divisors of an input go, which is known when all that it reads is.
        self._uncalibrated: dict[str, list[tuple[Tensors, str]]] = {}

    def add(self, linear: LinearSpec, codec: Codec, result: EncodedLinear, read: str, at: slice) -> None:
        """A Linear, or the same one of the experts `at`, and the input that it reads."""
        # Device memory is kept for the weights that are still to be rounded; a stack is copied at once.
        packed = {suffix: self.copies.take(tensor) for suffix, tensor in codec.pack(result.rounded).items()}
        each = [packed] if linear.experts is None else experts_of(packed)
        for name, found in self.tensors.items():
            if FORMATS[name].codec is not codec:
                continue
            for module, tensors in zip(linear.names[at], each, strict=True):
                found.update({f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()})
                if FORMATS[name].static_input_scale:
                    key = f"{module}.{INPUT_GLOBAL_SCALE}"
                    found[key] = torch.empty(0)
                    self._uncalibrated.setdefault(read, []).append((found, key))
        by_codec = self.linears.setdefault(linear.name, {})
        before, figures = by_codec.get(codec.name), result.figures
        by_codec[codec.name] = figures if before is None else LinearRounding.joined([before, figures])

    def calibrate(self, read: str, amax: float) -> None:
        """Set the divisors of an input whose largest |x| is amax."""
        for found, key in self._uncalibrated.pop(read, ()):
            found[key] = input_divisor(amax)


def hessian_bytes(group: InputGroup) -> int:
    """Training and held-out Hessian of one input group, float32; experts share theirs until the block is finished."""
    return 2 * 4 * group.in_features**2
