"""Slow, obvious rounding: look through the whole grid in exact arithmetic.

Only for tests. A grid is listed by code, so a tie goes to the even index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec, Rounded, grouped

#: magnitudes by code, from the tables of the OCP Microscaling Formats specification v1.0, section 5.3
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: eight subnormals, then 1.m × 2^(e − 7); code 127 is NaN
E4M3 = tuple(
    [m / 8 * 2.0**-6 for m in range(8)] + [(8 + m) / 8 * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
)[:-1]


def nearest(x: float, magnitudes: Sequence[float]) -> float:
    """The grid value nearest to x; ties to the even code, beyond the end the last value, the sign kept."""
    size = abs(x) if math.isfinite(x) else magnitudes[-1]
    code = min(range(len(magnitudes)), key=lambda c: (abs(Fraction(size) - Fraction(magnitudes[c])), c % 2))
    return math.copysign(magnitudes[code], x)


def critical_points(magnitudes: Sequence[float]) -> Tensor:
    """Float32 numbers at which rounding is decided: grid values and midpoints, one ulp to either side, both signs."""
    exact = torch.tensor([*magnitudes, *((a + b) / 2 for a, b in pairwise(magnitudes))])
    beyond = torch.tensor([magnitudes[-1] * 1.04, magnitudes[-1] * 2, 1e30, math.inf, 2.0**-126, 2.0**-149])
    up, down = (exact.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))
    positive = torch.cat((exact, up, down.clamp(min=0.0), beyond))
    return torch.cat((positive, -positive))


def smallest_power_of_two_at_least(x: float) -> int:
    """Biased exponent of it, no smaller than 2^-126."""
    return next(e for e in range(1, 255) if Fraction(2) ** (e - 127) >= Fraction(x))


def nearest_rounding(codec: Codec, weight: Tensor) -> Rounded:
    """Round to nearest: every group scaled by its amax, every weight to the nearest grid value."""
    global_scale = codec.global_scale(weight.abs().max().item())
    groups = grouped(weight, weight.shape[1] // codec.width(weight.shape[1]))
    scale = codec.nearest_scale(groups.abs().amax(-1), global_scale)
    return with_scale(codec, weight, scale, global_scale)


def with_scale(codec: Codec, weight: Tensor, scale: Tensor, global_scale: Tensor | None) -> Rounded:
    """Every weight to the nearest grid value under scales that are given."""
    factor = codec.scale_value(scale, global_scale).unsqueeze(-1)
    values = codec.round(grouped(weight, scale.shape[1]) / factor).flatten(1)
    return Rounded(values=values, scale=scale, global_scale=global_scale)
