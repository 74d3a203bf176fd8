"""Grid values of weights under given scales, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismaquant_ray.formats import codec_named
from prismaquant_ray.kernels.grid import constants, on_grid

# Weights of a program.
_WEIGHTS = 2048


def launch_round_scaled(weight: Tensor, factors: Tensor, codec: str) -> Tensor:
    """See `forward.scale_search`."""
    values = torch.empty_like(weight, memory_format=torch.contiguous_format)
    round_kernel[triton.cdiv(values.numel(), _WEIGHTS),](
        weight.contiguous(),
        factors.contiguous(),
        values,
        values.numel(),
        weight.shape[-1] // factors.shape[-1],
        AT_ONCE=_WEIGHTS,
        **constants(codec_named(codec)),
    )
    return values


@triton.jit
def round_kernel(
    weight,
    factors,
    values,
    count,
    width,
    AT_ONCE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SMALLEST: tl.constexpr,
    STEP: tl.constexpr,
):
    """weight and values (count,), factors (count / width,)."""
    place = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    there = place < count
    factor = tl.load(factors + place // width, mask=there, other=1.0)
    scaled = tl.div_rn(tl.load(weight + place, mask=there, other=0.0), factor)
    tl.store(values + place, on_grid(scaled, LOW, HIGH, SMALLEST, STEP), mask=there)
