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
    clamped = x.clamp(-E2M1_MAX, E2M1_MAX)
    magic = (clamped.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    magic = magic.clamp_(min=1.0).mul_(0.5 * _ROUND_TO_INTEGER)
    return (clamped + magic).sub_(magic).copysign_(x)


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest float8_e4m3fn value, ties to even, saturating at ±448; float32."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def pack_e2m1(values: Tensor) -> Tensor:
    """Pack grid values (O, I) into bytes (O, I/2): even column in the low nibble, bit 3 of a nibble the sign.

    Equal to compressed-tensors' packing, negative zero included.
    """
    # 2|v| is 0,1,2,3,4,6,8,12: the code is that value below 4, then one code per power-of-two half step.
    twice = values.abs().mul(2).to(torch.uint8)
    code = torch.where(twice <= 4, twice, torch.where(twice == 6, 5, torch.where(twice == 8, 6, 7)).to(torch.uint8))
    code |= values.signbit().to(torch.uint8) << 3
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of `pack_e2m1`: bytes (O, I/2) to float32 grid values (O, I)."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return table[codes.to(torch.int64)]


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
