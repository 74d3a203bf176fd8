"""Multiple-choice knapsack the slow way: every plan there is, and an integer program for what is too large for that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from prismaquant_ray.allocation.limits import Limit
from prismaquant_ray.allocation.problem import AllocationProblem


def every_plan(problem: AllocationProblem) -> list[tuple[int, float]]:
    """Bytes and cost of all combinations of formats."""
    rows = [
        [(int(size), float(cost)) for size, cost in zip(sizes, costs, strict=True) if not math.isnan(cost)]
        for sizes, costs in zip(problem.size, problem.cost, strict=True)
    ]
    return [(sum(size for size, _ in plan), math.fsum(cost for _, cost in plan)) for plan in itertools.product(*rows)]


def cheapest_cost(problem: AllocationProblem, budget: int) -> float:
    """Cost of the best plan by looking at all of them; inf when none fits."""
    return min((cost for size, cost in every_plan(problem) if size <= budget), default=math.inf)


def cheapest_within(problem: AllocationProblem, limits: Sequence[Limit]) -> float:
    """Cost of the best plan within all limits by looking at all of them; inf when none keeps them."""
    best = math.inf
    for choice in itertools.product(range(len(problem.formats)), repeat=len(problem.groups)):
        columns = np.array(choice)
        cost = problem.cost[np.arange(len(columns)), columns].sum()
        if cost < best and all(limit.used(columns) <= limit.limit for limit in limits):
            best = float(cost)
    return best


def integer_program(problem: AllocationProblem, budget: int) -> float:
    """Cost of the plan HiGHS finds with no relative gap allowed."""
    group, column = np.nonzero(problem.allowed)
    cost, size = problem.cost[group, column], problem.size[group, column]
    once = csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))), shape=(len(problem.groups), len(group)))
    # HiGHS also stops at an absolute gap of 1e-6 and forgives 1e-6 of a constraint: scale both out of the way.
    result = milp(
        cost * (1e3 / np.abs(cost).max()),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(size[None] / budget * 1e3, ub=1e3)],
        integrality=np.ones(len(group)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert result.status == 0, result.message
    taken = result.x > 0.5
    assert size[taken].sum() <= budget
    return math.fsum(cost[taken].tolist())
