"""The search for factors, column by column and group by group, as slow as it is obvious."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prismaquant_ray.formats import FORMATS, FormatName
from tests.reference.codecs import E2M1, E4M3, nearest, nearest_rounding


def candidates(importance: Tensor, weight: Tensor) -> list[Tensor]:
    """Every s (I,) that is tried for E[x²] (I,) of an input and the weight (O, I) that reads it."""
    found = [torch.ones(len(importance))]
    for a in (1 / 4, 3 / 8, 1 / 2):
        for b in (0, 1 / 4, 1 / 2):
            logs = [
                a * math.log(math.sqrt(float(mean))) - b * math.log(math.sqrt(float((column.double() ** 2).sum())))
                for mean, column in zip(importance, weight.T, strict=True)
            ]
            mean_log = sum(logs) / len(logs)
            found.append(torch.tensor([math.exp(min(6.0, max(-6.0, log - mean_log))) for log in logs]))
    return found


def error(rows: Tensor, importance: Tensor, amax: Tensor, weight: Tensor, s: Tensor) -> float:
    """Mean square error of the output under NVFP4, both roundings, errors of columns taken as independent."""
    codec = FORMATS[FormatName.NVFP4].codec
    assert codec is not None
    x, w = rows / s, weight * s
    # Twice what was seen maps to the largest scale and value; a BF16 number not above it.
    divisor = torch.tensor(448 * 6 / (2 * float((amax / s).max())))
    divisor = (divisor.view(torch.int32) & -65536).view(torch.float32)
    at_input = _rounded(x, float(divisor)) - x
    at_weight = codec.dequantized(nearest_rounding(codec, w)).float() - w
    total = 0.0
    for column in range(len(s)):
        norm = float((w[:, column].double() ** 2).sum())
        total += float((at_input[:, column].double() ** 2).mean()) * norm
        total += 0.3 * float((at_weight[:, column].double() ** 2).sum()) * float(importance[column] / s[column] ** 2)
    return total


def _rounded(x: Tensor, divisor: float) -> Tensor:
    """Every 16 values of a row to E2M1 under an E4M3 scale below the divisor."""
    found = torch.empty_like(x)
    for row in range(len(x)):
        for start in range(0, x.shape[1], 16):
            group = x[row, start : start + 16]
            scale = nearest(float(group.abs().max()) / 6 * divisor, E4M3) / divisor
            for column in range(16):
                found[row, start + column] = nearest(float(group[column]) / scale, E2M1) * scale if scale else 0.0
    return found
