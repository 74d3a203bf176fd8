"""Whether every number of a tensor is one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is one pass where a comparison of every element is several. What is not finite makes the sum so; only when
    finite numbers overflow together must each be asked.
    """
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
