"""Rounding to a codec's grid inside kernels: `Codec.round`, bit by bit."""

from __future__ import annotations

import triton
import triton.language as tl

from prismaquant_ray.formats.base import Codec


def constants(codec: Codec) -> dict[str, float]:
    """A grid as the constants of a kernel that calls `on_grid`."""
    grid = codec.grid
    return {"LOW": grid.low, "HIGH": grid.high, "SMALLEST": grid.smallest_normal, "STEP": grid.step}


@triton.jit
def on_grid(x, LOW: tl.constexpr, HIGH: tl.constexpr, SMALLEST: tl.constexpr, STEP: tl.constexpr):
    """Nearest value of `formats.grids.Grid`, ties to even, saturating, with the sign of x; as `grids.snap` does."""
    clamped = tl.minimum(tl.maximum(x, LOW), HIGH)
    power = (clamped.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # 1.5 · 2²³. The product is exact, so that only the sum is rounded.
    large = tl.maximum(power, SMALLEST) * (STEP * 12582912.0)
    magnitude = ((clamped + large) - large).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (magnitude | sign).to(tl.float32, bitcast=True)
