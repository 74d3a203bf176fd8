"""Loss over bytes and time: one frontier for each limit on the time of a prompt's token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prismaquant_ray.allocation.dual import Dual
from prismaquant_ray.allocation.limits import Limit, least_use, within
from prismaquant_ray.allocation.plans import Planner
from prismaquant_ray.allocation.problem import Floats, Ints, Relaxation
from prismaquant_ray.settings.allocation import LimitsConfig
from prismaquant_ray.settings.budget import BudgetConfig

__all__ = ["LimitedFrontier", "surface"]

# Limits on prefill that are shown, and the budgets at which each is solved.
_PREFILL = (1.0, 1.1, 1.25, 1.5, 2.0)
_BUDGETS = 25


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LimitedFrontier:
    """The least loss of plans within a limit on prefill, None for no limit, at (budgets,) bytes of codes and scales.

    Of the linear relaxation, in which a group may be split between formats: no plan is better.
    """

    prefill: float | None
    bytes: Ints
    cost: Floats


def surface(planner: Planner) -> list[LimitedFrontier]:
    """Frontiers within limits on prefill, and without; empty where no format trades time for loss at the same bytes."""
    if not _is_a_choice(planner):
        return []
    problem = planner.problem(BudgetConfig(bpp=1.0))
    relaxation = Relaxation.of(problem)
    targets = [int(target * planner.sizes.parameters / 8) for target in planner.config.sweep]
    low, high = int(relaxation.bytes[0]), min(max(targets), problem.largest_bytes)
    # Near the smallest plan the frontier is steepest.
    budgets = np.unique((low + (max(low, high) - low) * np.linspace(0, 1, _BUDGETS) ** 2).astype(np.int64))
    found = []
    for most in _PREFILL:
        (prefill,) = planner.times.limits(LimitsConfig(prefill=most))
        fastest = least_use(problem, prefill)
        limits = [(Limit(name="budget", use=problem.size, limit=int(budget)), prefill) for budget in budgets]
        reached = [place for place, each in enumerate(limits) if within(fastest, each)]
        cost = [Dual(problem, limits[place], fastest).bound for place in reached]
        if reached:
            found.append(LimitedFrontier(prefill=most, bytes=budgets[reached], cost=np.maximum(cost, 0.0)))
    free = np.maximum(np.interp(budgets, relaxation.bytes, relaxation.value), 0.0)
    return [*found, LimitedFrontier(prefill=None, bytes=budgets, cost=free)]


def _is_a_choice(planner: Planner) -> bool:
    """Whether some group has two formats of the same bytes, one of them faster."""
    sizes, prefill = planner.sizes, planner.times.prefill
    for column in range(len(sizes.formats)):
        alike = (sizes.weights == sizes.weights[:, [column]]) & sizes.allowed & sizes.allowed[:, [column]]
        if (alike & (prefill != prefill[:, [column]])).any():
            return True
    return False
