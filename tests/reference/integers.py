"""Slow, obvious reading of packed integers, and rounding to integers in exact arithmetic. Only for tests."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """`count` integers of each row of 32-bit words: a row is one string of bits, the lowest first, without gaps."""
    rows = []
    for row in words.tolist():
        string = sum((word % (1 << 32)) << (32 * place) for place, word in enumerate(row))
        rows.append([(string >> (bits * place)) % (1 << bits) - (1 << (bits - 1)) for place in range(count)])
    return torch.tensor(rows)


def dequantized(tensors: dict[str, Tensor], bits: int, group_of: list[int]) -> Tensor:
    """BF16 weight from `weight_packed`, `weight_scale` and, if there is one, `weight_zero_point`, packed down the rows.

    Column j has the scale and the zero point number group_of[j] of its row.
    """
    rows, columns = tensors["weight_shape"].tolist()
    codes, scale = unpacked(tensors["weight_packed"], bits, columns), tensors["weight_scale"]
    zero = tensors.get("weight_zero_point")
    zeros = torch.zeros_like(scale, dtype=torch.int64) if zero is None else unpacked(zero.T, bits, rows).T
    weight = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            g = group_of[j]
            weight[i, j] = float(codes[i, j] - zeros[i, g]) * float(scale[i, g])
    return weight.to(torch.bfloat16)


def nearest_integer(x: Fraction, low: int, high: int) -> int:
    """Ties to even, saturating."""
    return min(range(low, high + 1), key=lambda n: (abs(x - n), n % 2))
