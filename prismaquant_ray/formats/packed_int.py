"""Shared by INT3A16, INT4, INT6A16 and INT8A16: integers packed into 32-bit words, a BF16 scale per group of a row.

Tensors: `weight_packed` I32 (O, I·bits/32), codes without gaps, lowest bits first, offset by half of their number;
`weight_scale` BF16 (O, I/width); `weight_shape` I64 (2,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Rounded, Tensors, in_float32
from prismaquant_ray.formats.channel import Bf16ScaleCodec
from prismaquant_ray.formats.grids import Grid

WIDTHS = (128, 64, 32)


class PackedIntCodec(Bf16ScaleCodec):
    """Integers of so many bits, −2^(bits−1) … 2^(bits−1) − 1, under BF16 scales."""

    widths: tuple[int, ...] = WIDTHS
    multiple = WIDTHS[-1]

    def __init__(self, bits: int) -> None:
        half = 1 << bits - 1
        self.name = f"int{bits}"
        self.code_bits = bits
        # compressed-tensors maps amax to half the range of the codes.
        self.grid_max = half - 0.5
        # Steps of one everywhere.
        self.grid = Grid(-half, half - 1, half, 1 / half)
        # E4M3 has every integer up to 16 only.
        self.kept = torch.float8_e4m3fn if half <= 16 else torch.int8
        self._half = half
        # The fewest codes that fill whole bytes, of which there are one or three.
        self._together = 8 // bits if 8 % bits == 0 else 24 // bits

    def width(self, in_features: int) -> int:
        """The widest of 128, 64, 32 that divides the row."""
        return next(width for width in WIDTHS if in_features % width == 0)

    def round(self, x: Tensor) -> Tensor:
        """Nearest integer of the grid, ties to even: the grid's values, by fewer operations."""
        return x.round().clamp_(-self._half, self._half - 1)

    def pack(self, rounded: Rounded) -> Tensors:
        """Codes, scales and the shape."""
        *experts, rows, columns = rounded.values.shape
        shape = torch.tensor((rows, columns), dtype=torch.int64).repeat(*experts, 1)
        return {**super().pack(rounded), "weight_shape": shape}

    def packed(self, values: Tensor) -> Tensor:
        """Offset-binary codes in 32-bit words, lowest column first."""
        codes = in_float32(values).add(self._half).to(torch.int32).unflatten(-1, (-1, self._together))
        joined = (codes << self._shifts(self._together, self.code_bits, codes.device)).sum(-1, dtype=torch.int32)
        every = joined.unsqueeze(-1) >> self._shifts(self._together * self.code_bits // 8, 8, codes.device)
        words: Tensor = (every & 0xFF).to(torch.uint8).flatten(-2).view(torch.int32)
        return words

    def unpacked(self, codes: Tensor) -> Tensor:
        """Code − 2^(bits−1)."""
        count = self._together * self.code_bits // 8
        every = codes.contiguous().view(torch.uint8).to(torch.int32).unflatten(-1, (-1, count))
        joined = (every << self._shifts(count, 8, codes.device)).sum(-1, dtype=torch.int32).unsqueeze(-1)
        found = (joined >> self._shifts(self._together, self.code_bits, codes.device)) & ((1 << self.code_bits) - 1)
        values: Tensor = found.flatten(-2).to(torch.float32) - self._half
        return values

    @staticmethod
    def _shifts(count: int, step: int, device: torch.device) -> Tensor:
        return torch.arange(0, count * step, step, dtype=torch.int32, device=device)


def weight_scheme(codec: PackedIntCodec) -> Callable[[int], tuple[dict[str, Any], None]]:
    """`Format.scheme` of weights alone, by the width that a row has."""

    def found(in_features: int) -> tuple[dict[str, Any], None]:
        return {
            "num_bits": codec.code_bits,
            "type": "int",
            "strategy": "group",
            "group_size": codec.width(in_features),
            "symmetric": True,
            "dynamic": False,
        }, None

    return found
