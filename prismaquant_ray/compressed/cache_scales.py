"""The scales of a repository's FP8 KV cache, as vLLM loads and applies them.

vLLM takes 8-bit floats, symmetric, under one scale for all keys and one for all values of an attention (`tensor`), or
one per head of keys and values (`attn_head`); a scale that a repository lacks is 1 there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prismaquant_ray.cache_rounding import K_SCALE, V_SCALE, CacheScale
from prismaquant_ray.errors import InputError
from prismaquant_ray.layout import CachedAttention
from prismaquant_ray.source.checkpoint import Checkpoint

_STRATEGIES = ("tensor", "attn_head")


def rounds_cache(scheme: Mapping[str, Any]) -> bool:
    """Whether a quantization_config has a KV cache scheme that vLLM takes and that can be computed here."""
    found = scheme.get("kv_cache_scheme")
    if not isinstance(found, dict):
        return False
    is_float8 = found.get("type") == "float" and found.get("num_bits") == 8
    return bool(
        is_float8 and found.get("strategy") in _STRATEGIES and found.get("symmetric") and not found.get("dynamic")
    )


def read_cache_scales(source: Checkpoint, attention: Sequence[CachedAttention]) -> dict[str, CacheScale]:
    """The scales of these attentions, by name.

    Raises:
        InputError: a scale is not a positive number, or has a shape that vLLM does not take.
    """
    names = [f"{each.name}.{suffix}" for each in attention for suffix in (K_SCALE, V_SCALE)]
    read = source.read([name for name in names if name in source.stored])
    for name, tensor in read.items():
        heads = max(1, tensor.numel())
        if tensor.shape not in ((), (heads,), (heads, 1, 1)) or not bool((tensor.isfinite() & (tensor > 0)).all()):
            raise InputError(
                f"{source.store.uri}: {name} of shape {tuple(tensor.shape)} is no positive scale, or one per head; the "
                "repository is damaged, fetch or make it again"
            )
    scales = {name: tensor.float().view(-1, 1, 1) for name, tensor in read.items()}
    return {
        each.name: CacheScale(*(_scale(scales, f"{each.name}.{suffix}") for suffix in (K_SCALE, V_SCALE)))
        for each in attention
    }


def _scale(scales: Mapping[str, Tensor], name: str) -> float | Tensor:
    found = scales.get(name)
    if found is None:
        return 1.0
    return found if math.prod(found.shape) > 1 else float(found)
