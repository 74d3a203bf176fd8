"""A fast check for NaN and infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(*tensors: Tensor) -> bool:
    """Whether no element of any of the tensors, all on one device, is NaN or infinite. The host waits once.

    A sum is one pass, a test of every element several. NaN and infinity make the sum non-finite; every element is
    tested only then, because finite numbers may overflow together.
    """
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors])
    return bool(torch.isfinite(sums).all()) or all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
