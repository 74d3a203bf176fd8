"""The number grids formats are made of: E2M1, E4M3 and E8M0 scales.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.1–5.3 and 6; ties go to the even code.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E8M0_BIAS = 127
_EXPONENT_BITS = 0x7F800000
# 1.5 · 2²³: adding and subtracting step · this leaves a multiple of `step`, rounded to even by the FPU.
_ROUND_TO_INTEGER = 12582912.0


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest of ±{0, ½, 1, 1½, 2, 3, 4, 6}, ties to even, saturating; float32 of the same shape.

    E2M1 has one mantissa bit, so the step is half the power of two below |x|, and ½ below 1.
    """
    return snap_e2m1(x).copysign_(x)


def snap_e2m1(x: Tensor) -> Tensor:
    """The same but for the sign of zero."""
    return _snap(x, E2M1_MAX, 1.0, 0.5)


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest float8_e4m3fn value, ties to even, saturating at ±448; float32 of the same shape.

    E4M3 has three mantissa bits, so the step is an eighth of the power of two below |x|, and 2⁻⁹ below 2⁻⁶.
    """
    return _snap(x, E4M3_MAX, 2.0**-6, 0.125).copysign_(x)


def _snap(x: Tensor, end: float, smallest_normal: float, step: float) -> Tensor:
    """Nearest multiple of `step` times the power of two below |x|, but for the sign of zero."""
    clamped = x.clamp(-end, end)
    magic = (clamped.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    magic = magic.clamp_(min=smallest_normal).mul_(step * _ROUND_TO_INTEGER)
    return clamped.add_(magic).sub_(magic)


def pack_e2m1(values: Tensor) -> Tensor:
    """Pack grid values (O, I) into bytes (O, I/2): even column in the low nibble, bit 3 of a nibble the sign.

    Equal to compressed-tensors' packing, negative zero included.
    """
    # As E4M3, ½ is 0x30 and the values from 1 on are 0x38, 0x3C, … 0x4C: one code every four bytes.
    stored = values.to(torch.float8_e4m3fn).view(torch.uint8)
    size = stored & 0x7F
    code = (size >> 2).clamp_(min=12).sub_(12)
    code |= size == 0x30
    code |= (stored & 0x80) >> 4
    # Two codes as one little-endian 16-bit number.
    pairs = code.view(torch.int16)
    return ((pairs >> 4) | pairs).to(torch.uint8)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of `pack_e2m1`: bytes (O, I/2) to float32 grid values (O, I)."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], device=packed.device)
    # A table of bytes: two values are fetched as one 64-bit number.
    table = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1).view(torch.float64).squeeze(-1)
    return table[packed.to(torch.int32)].view(torch.float32)


def e8m0_at_least(x: Tensor) -> Tensor:
    """Biased exponent (uint8) of the smallest power of two ≥ x, for x > 0; zero and subnormal x give 2⁻¹²⁶.

    Exact: a float32 is a power of two when its mantissa bits are zero.
    """
    bits = x.to(torch.float32).view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return exponent.clamp_(1, 254).to(torch.uint8)


def e8m0_value(exponent: Tensor) -> Tensor:
    """2^(e − 127) as float32 for a biased exponent e ≥ 1, exactly."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)
