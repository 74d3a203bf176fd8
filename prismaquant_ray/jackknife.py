"""The jackknife: a standard error from figures of all samples but one."""

from __future__ import annotations

from torch import Tensor


def standard_error(left_out: Tensor) -> float:
    """√((S − 1)/S · Σ_s (c_s − c̄)²), for the figure with each of S samples left out (S,); 0 for a single sample."""
    n = len(left_out)
    if n < 2:
        return 0.0
    return float(((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt())
