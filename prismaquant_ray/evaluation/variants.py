"""Models run side by side: the source, plans over its stored candidates, and a quantized repository.

They run block by block on the same tokens. Row 0 is the source; each variant has its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prismaquant_ray.block_records import CacheScales
from prismaquant_ray.cache_rounding import CacheScale, scales_of
from prismaquant_ray.calibration.dataset import Batch
from prismaquant_ray.compressed.activations import InputRounding
from prismaquant_ray.evaluation.routing import ReroutedTokens
from prismaquant_ray.factors import Equalization, factors_of
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.forward.decoded_candidates import CandidateDecoder
from prismaquant_ray.layout import Block, BlockKind
from prismaquant_ray.model.attention_cache import watching
from prismaquant_ray.model.runner import ModelRunner


class EncodedBlocks(Protocol):
    """What the forward pass of a run stored of its blocks."""

    def tensors(self, block: int, name: FormatName) -> Mapping[str, Tensor]:
        """The candidates of a block in a format, by shipped name."""

    def equalization(self, block: int) -> Equalization:
        """The folds of a block with their factors."""

    def cache(self, block: int) -> Mapping[str, CacheScales]:
        """The scales of an FP8 cache of a block, by attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A model to measure: a `choice` of stored candidates by fused group, or None for the repository.

    Without `activations` only its weights are rounded. With `cache` keys and values are rounded, too, as an FP8 cache
    does; a repository says itself whether it has one.
    """

    choice: Mapping[str, FormatName] | None
    activations: bool
    cache: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Replacement:
    """A substitute for a parameter (None keeps it), and the rounding of its input, if any."""

    weight: Tensor | None
    rounding: InputRounding | None


Replacements = Mapping[str, Replacement]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedModel:
    """A repository as it runs: a runner of its decoded weights, input roundings by module name, scales of its cache."""

    runner: ModelRunner
    roundings: Mapping[str, InputRounding]
    cache: Mapping[str, CacheScale]


class Variants:
    """The source and its variants, on one device. A variant without a choice needs `repository`."""

    def __init__(
        self,
        source: ModelRunner,
        variants: Sequence[Variant],
        *,
        stored: EncodedBlocks | None = None,
        repository: QuantizedModel | None = None,
    ) -> None:
        self.source = source
        self.variants = tuple(variants)
        self.stored = stored
        self.repository = repository

    @property
    def rows(self) -> int:
        """Number of models: the source and the variants."""
        return 1 + len(self.variants)

    @cached_property
    def runners(self) -> tuple[ModelRunner, ...]:
        """The runner of each row."""
        return (self.source, *(self._runner(variant) for variant in self.variants))

    def load(self, index: int) -> LoadedBlock:
        """A block of every row, with its weights."""
        block = self.source.layout.blocks[index]
        modules = {runner: runner.load_block(index) for runner in dict.fromkeys(self.runners)}
        caches = [{}, *(self._cache(block, variant) for variant in self.variants)]
        return LoadedBlock(self.runners, block, modules, self._replacements(block, modules[self.source]), caches)

    def _cache(self, block: Block, variant: Variant) -> Mapping[str, CacheScale]:
        """The scales that a block's cache is rounded with, by attention; none where it stays as it is."""
        if not variant.activations:
            return {}
        if variant.choice is None:
            assert self.repository is not None
            return {each.name: self.repository.cache[each.name] for each in block.attention if self.repository.cache}
        if not variant.cache or not block.attention:
            return {}
        assert self.stored is not None
        folds = [fold for fold, _ in self.stored.equalization(block.index)]
        return scales_of(block, self.stored.cache(block.index), folds, variant.choice)

    @contextmanager
    def resident(self, part: Callable[[ModelRunner], Any]) -> Iterator[None]:
        """A part of every model outside its blocks, such as `ModelRunner.exit`, is loaded inside the with-block."""
        with ExitStack() as stack:
            for runner in dict.fromkeys(self.runners):
                stack.enter_context(part(runner))
            yield

    @contextmanager
    def head_of(self, row: int) -> Iterator[None]:
        """The output head of a row's runner is the row's own; inside `resident` of what holds the head."""
        runner = self.runners[row]
        with replaced(runner.meta_model.model, self._heads[row], runner.dtype):
            yield

    @cached_property
    def _heads(self) -> list[Replacements]:
        """Cached, because exits run once per microbatch."""
        heads = self.source.layout.of(BlockKind.HEAD)
        return self._replacements(heads[0]) if heads else self._head_roundings(self.source.head_name)

    def _runner(self, variant: Variant) -> ModelRunner:
        if variant.choice is not None:
            return self.source
        assert self.repository is not None
        return self.repository.runner

    def _replacements(self, block: Block, module: nn.Module | None = None) -> list[Replacements]:
        """Replacements in the block of each row's runner; `module` is the source's."""
        chosen = [
            {group.name: variant.choice[group.name] for group in block.groups} if variant.choice else {}
            for variant in self.variants
        ]
        used = {name for choice in chosen for name in choice.values() if FORMATS[name].codec is not None}
        stored: dict[FormatName, Mapping[str, Tensor]] = {}
        equalization: Equalization = ()
        if used and self.stored is not None:
            stored = {name: self.stored.tensors(block.index, name) for name in sorted(used)}
            equalization = self.stored.equalization(block.index)
        decoder = CandidateDecoder(stored, self.source.copies)
        shared: dict[tuple[str, FormatName], InputRounding] = {}
        rows: list[Replacements] = [{}]
        for variant, choice in zip(self.variants, chosen, strict=True):
            if variant.choice is None:
                rows.append(self._roundings(block) if variant.activations else {})
                continue
            found = self._folded(block, module, [(f, s) for f, s in equalization if f.is_used(block, choice)])
            for group in block.groups:
                name = choice[group.name]
                if FORMATS[name].codec is None:
                    continue
                decoded = decoder.decode(group, name)
                for matrix in group.matrices:
                    for parameter in matrix.parameters:
                        rounding = None
                        if variant.activations and FORMATS[name].round_activation is not None:
                            key = (matrix.input, name)
                            if key not in shared:
                                shared[key] = _rounding(name, decoded.input_scales[parameter])
                            rounding = shared[key]
                        found[parameter] = Replacement(weight=decoded.weights[parameter], rounding=rounding)
            rows.append(found)
        return rows

    def _folded(self, block: Block, module: nn.Module | None, equalization: Equalization) -> dict[str, Replacement]:
        """The source's parameters with factors in them."""
        stored = self.source.stored_types(block.index) if equalization else {}
        found: dict[str, Replacement] = {}
        for name, factors in factors_of(equalization).items():
            assert module is not None, "nothing is folded into what a head reads"
            weight = factors.apply(module.get_parameter(name).data, stored[name])
            found[name] = Replacement(weight=weight, rounding=None)
        return found

    def _roundings(self, block: Block) -> Replacements:
        """Input roundings of a repository's block, by parameter."""
        assert self.repository is not None
        modules = {
            parameter.name: parameter.tensors[0].removesuffix(".weight")
            for parameter in block.parameters
            if parameter.tensors
        }
        for group in block.groups:
            for matrix in group.matrices:
                if matrix.experts is not None:
                    # Runtimes apply one scale to all experts of a layer, and to gate and up.
                    modules[matrix.parameters[0]] = matrix.linears[0].names[0]
        known = self.repository.roundings
        return {
            parameter: Replacement(weight=None, rounding=known[module])
            for parameter, module in modules.items()
            if module in known
        }

    def _head_roundings(self, head: str) -> list[Replacements]:
        rows: list[Replacements] = [{}]
        for variant in self.variants:
            rounding = None
            if variant.choice is None and variant.activations:
                assert self.repository is not None
                rounding = self.repository.roundings.get(head)
            rows.append({} if rounding is None else {f"{head}.weight": Replacement(weight=None, rounding=rounding)})
        return rows


class LoadedBlock:
    """A block of every row. `modules` are by runner, `replacements` and scales of rounded `caches` by row."""

    def __init__(
        self,
        runners: Sequence[ModelRunner],
        block: Block,
        modules: Mapping[ModelRunner, nn.Module],
        replacements: Sequence[Replacements],
        caches: Sequence[Mapping[str, CacheScale]],
    ) -> None:
        self.runners = tuple(runners)
        self.block = block
        self.modules = modules
        self.replacements = tuple(replacements)
        self.caches = tuple(caches)
        self.routing = ReroutedTokens(block, self.rows)

    @torch.no_grad()
    def run(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Output of the block per row (rows, …), for inputs (rows, …), or (1, …) when all rows share one input.

        What its routers choose is counted in `routing`.
        """
        outputs = []
        for row, runner in enumerate(self.runners):
            with self.routing.watching(row, self.modules[runner]):
                outputs.append(self.row(row, hidden[row if len(hidden) > 1 else 0], batch))
        return torch.stack(outputs)

    def row(self, row: int, hidden: Tensor, batch: Batch) -> Tensor:
        """Output of the block of one row."""
        runner = self.runners[row]
        module, scales = self.modules[runner], self.caches[row]
        with ExitStack() as stack:
            stack.enter_context(replaced(module, self.replacements[row], runner.dtype))
            if scales:
                stack.enter_context(watching(module, self.block, lambda name, *pair: scales[name].rounded(*pair)))
            return runner.run_block(self.block.index, module, hidden, batch.inputs)

    @property
    def rows(self) -> int:
        """The source and its variants."""
        return len(self.runners)


class Shared:
    """A rounding that several matrices apply to the same tensor in turn; it is computed once."""

    def __init__(self, rounding: InputRounding) -> None:
        self.rounding = rounding
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The rounded tensor, shaped like x."""
        if self._last is None or self._last[0] is not x:
            self._last = x, self.rounding(x)
        return self._last[1]

    def forget(self) -> None:
        """Release the tensor."""
        self._last = None


def _rounding(name: FormatName, scale: Tensor | None) -> Shared:
    function = FORMATS[name].round_activation
    assert function is not None
    return Shared(lambda x: function(x.flatten(0, -2).float(), scale).view_as(x).to(x.dtype))


@contextmanager
def replaced(module: nn.Module, replacements: Replacements, dtype: torch.dtype) -> Iterator[None]:
    """Inside the with-block, replace parameters of the module (by path) and round their inputs."""
    with ExitStack() as stack:
        roundings: dict[nn.Module, dict[str, InputRounding]] = {}
        for path, replacement in replacements.items():
            owner, _, leaf = path.rpartition(".")
            holder = module.get_submodule(owner)
            if replacement.weight is not None:
                parameter = module.get_parameter(path)
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = replacement.weight.to(dtype)
            if replacement.rounding is None:
                continue
            if isinstance(replacement.rounding, Shared):
                stack.callback(replacement.rounding.forget)
            if isinstance(holder, nn.Linear):
                stack.callback(holder.register_forward_pre_hook(_hook(replacement.rounding)).remove)
            else:
                roundings.setdefault(holder, {})[leaf] = replacement.rounding
        for holder, found in roundings.items():
            # Packed experts: read by `model.experts`.
            holder.roundings = found  # type: ignore[assignment]
            stack.callback(delattr, holder, "roundings")
        yield


def _hook(rounding: InputRounding) -> Any:
    return lambda _, args: (rounding(args[0]), *args[1:])
