"""An FP8 KV cache as vLLM keeps it: E4M3 codes under one scale for all keys and one for all values of an attention.

A key or value x is stored as the E4M3 number nearest x / scale, and read as that times the scale (vLLM 0.32,
`reshape_and_cache` with `k_scale` and `v_scale`); what is beyond 448 · scale saturates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prismaquant_ray.block_records import CacheScales
from prismaquant_ray.factors import Equalization
from prismaquant_ray.fold import Fold
from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.grids import E4M3_MAX, round_e4m3
from prismaquant_ray.layout import Block, CachedAttention

#: Suffixes of the tensors of an attention's scales, of keys and of values.
K_SCALE, V_SCALE = "k_scale", "v_scale"
#: Bytes of one of them: F32 (1,).
CACHE_SCALE_BYTES = 4
# Keys and values may be this many times as large as in calibration: E4M3 is a floating point, so room above costs
# nothing until codes become subnormal, and what does not fit saturates.
_HEADROOM = 2.0


class CacheScale(NamedTuple):
    """What keys and values are divided by: numbers, or tensors that are broadcast, as (heads, 1, 1) of each head."""

    key: float | Tensor
    value: float | Tensor

    def rounded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (sequences, heads, tokens, size) as they are read from the cache."""
        return round_cached(key, self.key), round_cached(value, self.value)


def round_cached(x: Tensor, scale: float | Tensor) -> Tensor:
    """Keys or values (sequences, heads, tokens, size) as they are read from an FP8 cache, in their dtype."""
    divided = x.float() / scale
    return round_e4m3(divided).mul_(scale).to(x.dtype)


def cache_scale(amax: float) -> float:
    """The scale for keys or values whose largest absolute value in calibration is amax, at least 2 · amax / 448.

    The smallest such BF16 number: runtimes that hold scales in BF16 have the same one. 1 where all of them are 0.
    """
    if amax == 0.0:
        return 1.0
    exact = torch.tensor(_HEADROOM * amax / E4M3_MAX, dtype=torch.float64).to(torch.float32)
    # Adding almost one unit of the last place of BF16 before its upper half is taken rounds up.
    return float(((exact.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32))


def cache_scales(attention: CachedAttention, key: Tensor, value: Tensor, equalization: Equalization) -> CacheScales:
    """Scales for the largest |k| (), and |v| of every channel (heads · size,), in calibration."""
    factors, key_amax, value_amax = value_factors(attention, equalization), float(key), float(value.max())
    folded = None if factors is None else cache_scale(float((value * factors.to(value.device)).max()))
    return CacheScales(
        key=cache_scale(key_amax),
        value=cache_scale(value_amax),
        folded_value=folded,
        key_amax=key_amax,
        value_amax=value_amax,
    )


def value_factors(attention: CachedAttention, equalization: Equalization) -> Tensor | None:
    """What the fold of an attention multiplies values by, float32 (heads · size,); None without one."""
    return next((1 / s for fold, s in equalization if _scales_values(attention, fold)), None)


def scales_of(
    block: Block, cache: Mapping[str, CacheScales], folds: Sequence[Fold], choice: Mapping[str, FormatName]
) -> dict[str, CacheScale]:
    """The scales of a block's attentions in the repository of a choice."""
    found = {}
    for attention in block.attention:
        scales = cache[attention.name]
        folded = any(_scales_values(attention, fold) and fold.is_used(block, choice) for fold in folds)
        value = scales.folded_value if folded and scales.folded_value is not None else scales.value
        found[attention.name] = CacheScale(scales.key, value)
    return found


def scale_tensors(scales: Mapping[str, CacheScale]) -> dict[str, Tensor]:
    """The tensors that hold scales, F32 (1,), by name."""
    return {
        f"{name}.{suffix}": torch.tensor([scale], dtype=torch.float32)
        for name, pair in scales.items()
        for suffix, scale in zip((K_SCALE, V_SCALE), pair, strict=True)
    }


def cache_scale_names(attention: Iterable[CachedAttention]) -> tuple[str, ...]:
    """The tensors that hold the scales of these."""
    return tuple(f"{each.name}.{suffix}" for each in attention for suffix in (K_SCALE, V_SCALE))


def _scales_values(attention: CachedAttention, fold: Fold) -> bool:
    """Whether a fold is that of values: rows inside the attention are divided, and columns inside it multiplied."""
    inside = f"{attention.path}."
    return any(member.axis == -2 and member.parameter.startswith(inside) for member in fold.divided) and any(
        member.parameter.startswith(inside) for member in fold.multiplied
    )
