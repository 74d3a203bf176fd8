"""A limit beside the budget: what every choice uses of a resource, and the most that a plan may use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prismaquant_ray.allocation.problem import AllocationProblem, Ints, Plan
from prismaquant_ray.errors import InputError

__all__ = ["Limit", "least_use", "within"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Limit:
    """Use of a resource by every choice, `use` (groups, formats) int64, and the most a plan may use.

    `name` is the setting that gives the limit, in multiples of `unit`.
    """

    name: str
    use: Ints
    limit: int
    unit: int = 1

    def used(self, columns: Ints) -> int:
        """Units that the plan with these columns (groups,) uses."""
        return int(self.use[np.arange(len(columns)), columns].sum())

    def kept(self, problem: AllocationProblem, plan: Plan) -> bool:
        """Whether a plan is within the limit."""
        return self.used(problem.columns(plan.choice)) <= self.limit

    def refusal(self, least: int) -> InputError:
        """The error of a budget whose plans use at least so much."""
        reachable = math.ceil(10_000 * least / self.unit) / 10_000
        return InputError(
            f"{self.name} {self.limit / self.unit:.4g}: no plan within the budget keeps it, the least that one takes "
            f"is {reachable:.4f}; allow that, or change budget, formats, force or floor"
        )


def least_use(problem: AllocationProblem, limit: Limit) -> Ints:
    """Columns (groups,) of the plan that uses least of a limit, and of those the smallest."""
    most = np.iinfo(np.int64).max
    use = np.where(problem.allowed, limit.use, most)
    least = use == use.min(axis=1, keepdims=True)
    columns: Ints = np.where(least, problem.size, most).argmin(axis=1)
    return columns


def within(columns: Ints, limits: Sequence[Limit]) -> bool:
    """Whether the plan with these columns keeps all limits."""
    return all(limit.used(columns) <= limit.limit for limit in limits)
