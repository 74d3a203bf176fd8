"""Cost against bytes: every Lagrangian plan from one solve, plans for a list of budgets, and the knee between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prismaquant_ray.allocation.limited_solver import solver
from prismaquant_ray.allocation.limits import Limit
from prismaquant_ray.allocation.problem import AllocationProblem, Plan, Relaxation

__all__ = ["Frontier", "frontier", "knee", "sweep"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frontier:
    """The convex lower boundary of all plans, from the smallest plan to the largest useful one.

    Breakpoint k is the optimal plan for exactly `bytes[k]` bytes. Between two breakpoints no plan lies below the
    line that joins them, though cheaper plans than the left one may lie above it: `sweep` finds those.
    """

    bytes: NDArray[np.int64]  # (breakpoints,) strictly rising
    cost: NDArray[np.float64]  # (breakpoints,) nats per token, falling and convex
    relaxation: Relaxation

    def plan(self, index: int) -> Plan:
        """The plan at a breakpoint; negative indices count from the largest.

        Raises:
            IndexError: there is no such breakpoint.
        """
        index = range(len(self.bytes))[index]
        return self.relaxation.plan(self.relaxation.points(index), int(self.bytes[index]), 0.0)


def frontier(problem: AllocationProblem) -> Frontier:
    """Every breakpoint of the Lagrangian frontier, from one sort of all hull edges."""
    relaxation = Relaxation.of(problem)
    return Frontier(bytes=relaxation.bytes, cost=relaxation.value, relaxation=relaxation)


def sweep(problem: AllocationProblem, budgets: Sequence[int], limits: Sequence[Limit] = ()) -> list[Plan]:
    """The cheapest plan for every budget in bytes (and within limits), in the order given.

    Cost never rises with the budget, also when a search was cut short.

    Raises:
        InputError: a budget is below the smallest plan, or no plan within it keeps a limit.
    """
    plan_for = solver(problem, limits)
    plans: dict[int, Plan] = {}
    previous: Plan | None = None
    for budget in sorted(set(budgets)):
        plan = plan_for.plan(budget)
        if previous is not None and previous.cost < plan.cost:
            bound = min(plan.bound, previous.cost)
            gap = (previous.cost - bound) / max(abs(previous.cost), math.ulp(0.0))
            plan = replace(previous, budget=budget, bound=bound, gap=gap)
        plans[budget] = previous = plan
    return [plans[budget] for budget in budgets]


def knee(x: ArrayLike, y: ArrayLike) -> int:
    """Index of the knee of a falling convex curve: the point farthest below its chord.

    Both axes are scaled to [0, 1] over the points given, then the largest vertical distance below the line from the
    first to the last point wins, the first one among equals (Satopaa et al. 2011, "Finding a 'Kneedle' in a
    Haystack", without its smoothing and threshold). The knee therefore belongs to the range x[0] to x[-1]: report
    both ends with it, and cut the curve first if only a part of it is of interest. A straight or flat curve has no
    knee; its first point is returned, because what follows buys nothing more than it.

    Args:
        x: (points,) bytes, strictly rising.
        y: (points,) cost.

    Raises:
        ValueError: fewer than three points, different lengths, a value that is not finite, or x not rising.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"A curve needs as many x as y values in one dimension, not {x.shape} and {y.shape}.")
    if len(x) < 3:
        raise ValueError(f"A knee needs at least 3 points; the curve has {len(x)}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all()):
        raise ValueError("A knee needs finite values and strictly rising x.")
    height = float(np.ptp(y))
    if height == 0:
        return 0
    across = (x - x[0]) / (x[-1] - x[0])
    below_chord = ((y[0] - y) - (y[0] - y[-1]) * across) / height
    index = int(np.argmax(below_chord))
    # A straight line is below its own chord by rounding only.
    return index if below_chord[index] > 1e-12 else 0
