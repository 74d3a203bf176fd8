"""The number grids formats are made of: E2M1, E4M3 and E8M0 scales.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.1–5.3 and 6; ties go to the even code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """Multiples of `step` times the power of two below |x|, which counts as at least `smallest_normal`, in low…high."""

    low: float
    high: float
    smallest_normal: float
    step: float


E2M1_MAX = 6.0
E4M3_MAX = 448.0
#: One mantissa bit: the step is half the power of two below |x|, and ½ below 1.
E2M1 = Grid(-E2M1_MAX, E2M1_MAX, 1.0, 0.5)
#: Three mantissa bits: the step is an eighth of the power of two below |x|, and 2⁻⁹ below 2⁻⁶.
E4M3 = Grid(-E4M3_MAX, E4M3_MAX, 2.0**-6, 0.125)
_EXPONENT_BITS = 0x7F800000
# 1.5 · 2²³: adding and subtracting step · this leaves a multiple of `step`, rounded to even by the FPU.
_ROUND_TO_INTEGER = 12582912.0


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest of ±{0, ½, 1, 1½, 2, 3, 4, 6}, ties to even, saturating; float32 of the same shape."""
    return snap(x, E2M1).copysign_(x)


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest float8_e4m3fn value, ties to even, saturating at ±448; float32 of the same shape."""
    return snap(x, E4M3).copysign_(x)


def snap(x: Tensor, grid: Grid) -> Tensor:
    """Nearest value of a grid, ties to even, without the sign of zero; float32 of the same shape."""
    clamped = x.clamp(grid.low, grid.high)
    power = (clamped.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    power = power.clamp_(min=grid.smallest_normal)
    # The product with alpha is exact, so that only the sum is rounded, fused or not.
    alpha = grid.step * _ROUND_TO_INTEGER
    return clamped.add_(power, alpha=alpha).sub_(power, alpha=alpha)


def pack_e2m1(values: Tensor) -> Tensor:
    """Pack grid values (O, I) into bytes (O, I/2): even column in the low nibble, bit 3 of a nibble the sign.

    Equal to compressed-tensors' packing, negative zero included.
    """
    # E4M3 holds every value: a table of its bytes.
    table = torch.zeros(256, dtype=torch.uint8, device=values.device)
    every = _e2m1(values.device).to(torch.float8_e4m3fn).view(torch.uint8)
    table[every.to(torch.int64)] = torch.arange(16, dtype=torch.uint8, device=values.device)
    return pack_nibbles(_looked_up(table, values.to(torch.float8_e4m3fn).view(torch.uint8)))


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of `pack_e2m1`: bytes (O, I/2) to float32 grid values (O, I)."""
    return unpack_nibbles(packed, _e2m1(packed.device))


@functools.cache
def _e2m1(device: torch.device) -> Tensor:
    """Every value by its code; made once, because a copy to a device makes the host wait."""
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], device=device)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16 (O, I) uint8 to bytes (O, I/2), the even column in the low nibble."""
    # Two codes as one little-endian 16-bit number.
    pairs = codes.view(torch.int16)
    return ((pairs >> 4) | pairs).to(torch.uint8)


def unpack_nibbles(packed: Tensor, values: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`, with the float32 value (16,) of each code in its place."""
    # A table of bytes: two values are fetched as one 64-bit number.
    table = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1).view(torch.float64).squeeze(-1)
    return _looked_up(table, packed).view(torch.float32)


def e4m3_value(codes: Tensor) -> Tensor:
    """float8_e4m3fn (any shape) in float32: the same as `to`, in half the time on a CPU."""
    every = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn)
    return _looked_up(every.to(torch.float32), codes.view(torch.uint8))


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    """table[places] for 256 entries and byte indices; several times as fast as indexing."""
    return table.index_select(0, places.to(torch.int32).flatten()).view(places.shape)


def divided_by(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once. Of a number alone CUDA would take the reciprocal, and round twice."""
    return x / (number if x.is_cpu else _number(number, x.device))


@functools.cache
def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def e8m0_at_least(x: Tensor) -> Tensor:
    """Biased exponent (uint8) of the smallest power of two ≥ x, for x > 0; zero and subnormal x give 2⁻¹²⁶.

    Exact: a float32 is a power of two when its mantissa bits are zero; any other mantissa carries into the exponent.
    """
    exponent = (x.to(torch.float32).view(torch.int32) + 0x7FFFFF) >> 23
    return exponent.clamp_(1, 254).to(torch.uint8)


def e8m0_value(exponent: Tensor) -> Tensor:
    """2^(e − 127) as float32 for a biased exponent e ≥ 1, exactly."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)
