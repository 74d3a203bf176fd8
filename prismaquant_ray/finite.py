"""A fast check for NaN and infinity."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is one pass, a test of every element several. NaN and infinity make the sum non-finite; every element is
    tested only then, because finite numbers may overflow together.
    """
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
