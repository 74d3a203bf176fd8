"""Problems for the allocator, made by hand or like those of a transformer."""

from __future__ import annotations

import math

import numpy as np

from prismaquant_ray.allocation.problem import AllocationProblem

NAN = math.nan


def make(cost: object, size: object) -> AllocationProblem:
    cost, size = np.array(cost, dtype=np.float64), np.array(size)
    groups = tuple(f"layers.{i}" for i in range(cost.shape[0]))
    return AllocationProblem(groups=groups, formats=tuple(f"F{j}" for j in range(cost.shape[1])), cost=cost, size=size)


def transformer(layers: int, seed: int, formats: int = 4) -> AllocationProblem:
    """Identical layers of a few shapes, costs that fall 4-fold a bit, noise, and formats some groups cannot take."""
    random = np.random.default_rng(seed)
    bits = np.array([4.5, 8.25, 8.0, 16.0, 6.25, 5.25, 4.25, 9.0])[:formats]
    width = np.tile([5120 * 7168, 5120 * 6144, 5120 * 34816, 17408 * 5120], layers)[:, None]
    cost = (
        1e-4 * random.lognormal(0, 1.5, (len(width), 1)) * 4.0**-bits * random.lognormal(0, 0.3, (len(width), formats))
    )
    cost[random.random(cost.shape) < 0.05] = NAN
    cost[:, 0] = np.where(np.isnan(cost[:, 0]), 1e-6, cost[:, 0])
    return make(cost, (width * bits / 8).astype(np.int64))


def smallest(problem: AllocationProblem) -> int:
    """Bytes of the smallest plan there is."""
    return int(np.where(problem.allowed, problem.size, 2**62).min(axis=1).sum())


def largest(problem: AllocationProblem) -> int:
    """Bytes of the largest plan of any kind: every group in its largest format, also where that costs more."""
    return int(problem.size.max(axis=1).sum())


def inside(problem: AllocationProblem, fraction: float) -> int:
    return int(smallest(problem) + fraction * (largest(problem) - smallest(problem)))
