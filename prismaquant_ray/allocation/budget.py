"""From a layout and a budget to integer bytes: the size of each candidate, and the bytes that may be spent.

`bpp` counts codes and group scales of quantizable Linears and nothing else. The two 4-byte scalars of an NVFP4
Linear are left out of it (they would put uniform NVFP4 at 4.5001 and out of a 4.5 budget); `bytes` counts every
byte of the repository, with a bound in place of the few that depend on the plan (names in headers and index) and an
allowance for the model card; `vram` counts every tensor as it is loaded, plus a server's KV cache and margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.kv_cache import Serving
from prismaquant_ray.cache_rounding import CACHE_SCALE_BYTES, cache_scale_names
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import refusal
from prismaquant_ray.formatting import memory
from prismaquant_ray.layout import Layout
from prismaquant_ray.records import CacheType
from prismaquant_ray.settings.budget import BudgetConfig

# Tensors of one Linear in the format that has most of them.
_TENSORS = 4
# Fixed parts of config.json, the manifest, the index and shard headers.
_FIXED_BYTES = 1 << 16
#: Bytes of a repository that are kept free for its README.md.
CARD_BYTES = 36 << 10


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sizes:
    """Bytes of every candidate: `weights` (groups, formats) int64 counts codes and group scales, `stored` also scalars.

    `allowed` is False where a group cannot take a format or a rule forbids it. `ignored` is the size of unquantized
    tensors; `fixed` is the size of everything except candidates, including `ignored`. `serving` is a server's memory
    beside the tensors, for a `vram` budget, and `kv_cache` the type of cache that these are of. `cache_scales` names
    the tensors that an FP8 one adds.
    """

    formats: tuple[FormatName, ...]
    weights: NDArray[np.int64]
    stored: NDArray[np.int64]
    allowed: NDArray[np.bool_]
    ignored: int
    fixed: int
    parameters: int
    serving: Serving | None = None
    kv_cache: CacheType = "bf16"
    cache_scales: tuple[str, ...] = ()

    def in_fp8(self) -> Sizes:
        """The same with an FP8 KV cache: its scales in the repository, half the bytes of keys and values in serving."""
        added = CACHE_SCALE_BYTES * len(self.cache_scales)
        return replace(
            self,
            ignored=self.ignored + added,
            fixed=self.fixed + added + sum(map(entry_bytes, self.cache_scales)),
            serving=None if self.serving is None else replace(self.serving, cache=self.serving.cache.in_fp8()),
            kv_cache="fp8",
        )

    def of(self, budget: BudgetConfig) -> NDArray[np.int64]:
        """(groups, formats) bytes as this kind of budget counts them."""
        return self.weights if budget.bpp is not None else self.stored

    def limit(self, budget: BudgetConfig) -> int:
        """Bytes of candidates that the budget allows. A `vram` budget may exceed the largest plan.

        Raises:
            InputError: no plan has that size; the message has both bounds.
        """
        table = self.of(budget)
        smallest = int(np.where(self.allowed, table, np.iinfo(np.int64).max).min(axis=1).sum())
        largest = int(np.where(self.allowed, table, 0).max(axis=1).sum())
        if budget.vram is not None:
            return self._vram_limit(budget.vram, smallest, largest)
        if budget.bpp is not None:
            limit = int(budget.bpp * self.parameters / 8)
            low, high = 8 * smallest / self.parameters, 8 * largest / self.parameters
            shown, bounds = f"{budget.bpp:g} bits per parameter", f"{low:.4f} and {high:.4f} bits per parameter"
        else:
            assert budget.bytes is not None
            limit = budget.bytes - self.fixed
            shown, bounds = f"{budget.bytes} bytes", f"{smallest + self.fixed} and {largest + self.fixed} bytes"
        if limit < smallest:
            raise InputError(f"budget {shown} is below the smallest plan; give one between {bounds}")
        if limit > largest:
            raise InputError(f"budget {shown} is above the largest plan; give one between {bounds}")
        return limit

    def _vram_limit(self, vram: int, smallest: int, largest: int) -> int:
        assert self.serving is not None
        room = self.serving.room(vram) - self.ignored
        if room >= smallest:
            return min(room, largest)
        cache, tokens = self.serving.cache_bytes, f"{self.serving.sequences} × {self.serving.context} tokens"
        needed = self.serving.needed(self.loaded(smallest))
        remedy = "" if self.kv_cache == "fp8" else ", or set kv_cache: fp8"
        beside = "not even the KV cache fits" if self.serving.room(vram) < 0 else "the smallest plan does not fit"
        raise InputError(
            f"budget.vram {memory(vram)}: {beside}; the smallest plan needs {memory(needed)} (weights "
            f"{memory(self.loaded(smallest))}, KV cache {memory(cache)} for {tokens}, margin "
            f"{memory(needed - self.loaded(smallest) - cache)}); lower context, sequences or margin{remedy}"
        )

    def loaded(self, choice_stored: int) -> int:
        """Bytes of all tensors as a server loads them, for this many bytes of candidates."""
        return self.ignored + choice_stored

    def bpp(self, choice_weights: int) -> float:
        """Bits per quantizable parameter for that many bytes of codes and scales."""
        return 8 * choice_weights / self.parameters


def measure(
    layout: Layout,
    formats: Sequence[FormatName],
    *,
    ignored_bytes: int,
    other_bytes: int,
    serving: Serving | None = None,
) -> Sizes:
    """Sizes of every candidate, with a KV cache in 16 bits.

    `ignored_bytes` counts unquantized tensors, `other_bytes` their entries and files.

    Raises:
        InputError: a group can take none of the formats, or a format fits no group.
    """
    shape = (len(layout.groups), len(formats))
    weights, stored = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    allowed = np.zeros(shape, dtype=np.bool_)
    for row, group in enumerate(layout.groups):
        for column, name in enumerate(formats):
            spec = FORMATS[name]
            if refusal(name, group):
                continue
            allowed[row, column] = True
            weights[row, column] = sum(
                len(item.names) * spec.weight_bytes(item.out_features, item.in_features) for item in group.linears
            )
            matrices = sum(len(item.names) for item in group.linears)
            stored[row, column] = weights[row, column] + spec.extra_bytes() * matrices
        if not allowed[row].any():
            reason = refusal(formats[0], group)
            raise InputError(f"{group.name} can take none of {', '.join(formats)} ({reason}); add BF16 to formats")
    for column, name in enumerate(formats):
        if not allowed[:, column].any():
            reason = refusal(name, layout.groups[0])
            raise InputError(f"no Linear can take {name} ({reason}); remove it from formats")
    names = sum(_TENSORS * len(linear.names) * entry_bytes(linear.names[-1]) for linear in layout.linears())
    return Sizes(
        formats=tuple(formats),
        weights=weights,
        stored=stored,
        allowed=allowed,
        ignored=ignored_bytes,
        fixed=ignored_bytes + other_bytes + names + _FIXED_BYTES + CARD_BYTES,
        parameters=layout.parameters,
        serving=serving,
        cache_scales=cache_scale_names(layout.attention),
    )


def entry_bytes(name: str) -> int:
    """Upper bound on the bytes of a tensor's entries in shard header, index, manifest and config."""
    return 3 * len(name) + 200
