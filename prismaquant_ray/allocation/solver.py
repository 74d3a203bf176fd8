"""Exact multiple-choice knapsack: the cheapest format for every group within a budget of bytes.

Two steps. `Relaxation` prunes dominated choices, takes the lower convex hull of every group, and sorts all hull
edges once by cost saved per byte (Sinha & Zoltners 1979, "The multiple-choice knapsack problem"); a prefix of that
list is the Lagrangian optimum, so every budget's linear bound is one binary search. `Solver.plan` then closes what
is left between the prefix and the bound: groups are merged one by one into a list of Pareto-optimal partial plans,
those likeliest to change first, and whatever cannot beat the best plan so far is dropped (Pisinger 1995, "A minimal
algorithm for the multiple-choice knapsack problem"). When nothing is left the plan is optimal.

The knapsack is NP-hard: instances whose costs are proportional to odd sizes can outlast any limit. Then the search
ends at `state_limit`, and the plan says how far from optimal it can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.problem import AllocationProblem, Plan
from prismaquant_ray.errors import InputError

__all__ = ["Relaxation", "Solver", "solve"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_EPSILON = float(np.finfo(np.float64).eps)
# A narrow first pass finds a good plan; the second pass then has far less to prove.
_SCOUT_WIDTH = 128
# The bound on what remains is rebuilt at most this often in one pass.
_REFRESHES = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Relaxation:
    """The linear relaxation of a problem for every budget at once.

    Points of a group are its non-dominated formats from small to large, left-aligned and padded with infinite cost.
    Breakpoint k is the plan after the k best edges; it is optimal for its bytes.
    """

    problem: AllocationProblem
    size: Ints  # (groups, points) bytes
    cost: Floats  # (groups, points) nats per token
    column: Ints  # (groups, points) column of the problem's tables
    hull: Ints  # (groups, points) points on the lower convex hull in order; the last one repeats
    edge_group: Ints  # (edges,) the group each hull edge belongs to, best edge first
    slope: Floats  # (edges,) nats per token saved for each byte, never increasing
    bytes: Ints  # (edges + 1,) size of every breakpoint
    value: Floats  # (edges + 1,) cost of every breakpoint
    unit: int  # every plan's size is bytes[0] plus a multiple of this

    @classmethod
    def of(cls, problem: AllocationProblem) -> Relaxation:
        """Prune, take hulls and sort: O(groups · formats² + edges log edges)."""
        size, cost, column = _pareto_points(problem)
        hull = _lower_hull(size, cost, np.zeros(len(size), dtype=np.int64))
        hull_size, hull_cost = np.take_along_axis(size, hull, 1), np.take_along_axis(cost, hull, 1)
        edge_group, step = np.nonzero(np.diff(hull, axis=1))
        added = hull_size[edge_group, step + 1] - hull_size[edge_group, step]
        saved = hull_cost[edge_group, step] - hull_cost[edge_group, step + 1]
        # Rounding may turn two nearly collinear edges of a group around; they must stay in order.
        slope = np.zeros(hull.shape)
        slope[edge_group, step] = saved / added
        slope = np.minimum.accumulate(slope, axis=1)[edge_group, step]
        order = np.argsort(-slope, kind="stable")
        # Summed from the cheap end, so that small costs are not differences of large ones.
        ends = np.concatenate([saved[order], [hull_cost[:, -1].sum()]])
        offsets = np.where(np.isfinite(cost), size - size[:, :1], 0)
        return cls(
            problem=problem,
            size=size,
            cost=cost,
            column=column,
            hull=hull,
            edge_group=edge_group[order],
            slope=slope[order],
            bytes=int(size[:, 0].sum()) + np.concatenate([[0], np.cumsum(added[order])]),
            value=np.cumsum(ends[::-1])[::-1],
            unit=max(1, int(np.gcd.reduce(np.unique(offsets)))),
        )

    def points(self, breakpoint_: int) -> Ints:
        """(groups,) the point every group has at a breakpoint."""
        steps = np.bincount(self.edge_group[:breakpoint_], minlength=len(self.hull))
        return np.take_along_axis(self.hull, steps[:, None], 1)[:, 0]

    def plan(self, points: Ints, budget: int, slack: float) -> Plan:
        """The plan with these points, at most `slack` nats per token above the optimum for the budget."""
        problem, rows = self.problem, np.arange(len(points))
        columns = self.column[rows, points]
        cost = math.fsum(problem.cost[rows, columns].tolist())
        return Plan(
            choice={group: problem.formats[j] for group, j in zip(problem.groups, columns.tolist(), strict=True)},
            cost=cost,
            size=int(self.size[rows, points].sum()),
            bound=cost - slack,
            gap=slack / max(abs(cost), math.ulp(0.0)),
            budget=budget,
        )


class Solver:
    """Plans for any number of budgets from one relaxation.

    Args:
        problem: costs and sizes.
        gap_tolerance: relative gap at which a plan is good enough. 0.0 asks for the optimum.
        state_limit: partial plans one search may keep, 5 bytes each; the width of its list is a sixteenth.
    """

    def __init__(
        self, problem: AllocationProblem, *, gap_tolerance: float = 0.0, state_limit: int = 4_000_000
    ) -> None:
        self.relaxation = Relaxation.of(problem)
        self._gap_tolerance = gap_tolerance
        self._state_limit = state_limit

    def plan(self, budget_bytes: int) -> Plan:
        """The cheapest plan of at most `budget_bytes`.

        Costs are compared in float64: a gap of 0.0 means that no plan is cheaper by more than rounding. Equal costs
        are decided by the smaller size, then by the order of the formats. A budget above the largest useful plan
        gives that plan.

        Raises:
            InputError: no plan is that small.
        """
        relaxed, problem = self.relaxation, self.relaxation.problem
        smallest = int(relaxed.bytes[0])
        if budget_bytes < smallest:
            raise InputError(
                f"A budget of {budget_bytes} bytes is too small: plans take {smallest} to "
                f"{problem.largest_bytes} bytes. Raise the budget or allow a smaller format."
            )
        # Bytes that no combination of formats can use would only loosen the bound.
        usable = budget_bytes - (budget_bytes - smallest) % relaxed.unit
        k = int(np.searchsorted(relaxed.bytes, usable, side="right")) - 1
        points = relaxed.points(k)
        spare = usable - int(relaxed.bytes[k])
        if k == len(relaxed.slope) or spare == 0:
            return relaxed.plan(points, budget_bytes, 0.0)
        worth = max(self._gap_tolerance, _EPSILON) * abs(float(relaxed.value[k]))
        search = _Search(relaxed, points, k, spare, worth)
        search.run(_SCOUT_WIDTH, self._state_limit)
        if not search.proven:
            search.run(max(_SCOUT_WIDTH, self._state_limit // 16), self._state_limit)
        return relaxed.plan(search.best_points, budget_bytes, search.gap)


def solve(problem: AllocationProblem, budget_bytes: int) -> Plan:
    """The cheapest plan of at most `budget_bytes`; see `Solver.plan`, which shares its preparation among budgets."""
    return Solver(problem).plan(budget_bytes)


class _Step(NamedTuple):
    """How the partial plans of one step came from those of the step before."""

    group: int
    parent: NDArray[np.int32]  # (states,) index among the previous step's states
    point: NDArray[np.int8]  # (states,) the group's point


class _Search:
    """What separates the Lagrangian plan from the optimum, at one budget.

    With λ the slope at the budget, each point of each group has a reduced cost r = Δcost + λ·Δsize ≥ 0 against the
    Lagrangian plan, and a plan with w spare bytes costs Σr + λ·w above the linear bound: that is its excess.
    """

    def __init__(self, relaxed: Relaxation, points: Ints, k: int, spare: int, worth: float) -> None:
        at = points[:, None]
        self.slope = float(relaxed.slope[k])
        self.spare = spare
        self.worth = worth  # an improvement of less is none
        self.points = points
        self.added = relaxed.size - np.take_along_axis(relaxed.size, at, 1)
        price, change = self.slope * self.added, relaxed.cost - np.take_along_axis(relaxed.cost, at, 1)
        reduced = change + price
        noise = 4 * _EPSILON * (np.abs(change) + np.abs(price))
        self.reduced = np.where(np.isinf(reduced), np.inf, np.where(reduced <= noise, 0.0, reduced))
        self.best_points = points
        self.excess = self.slope * spare
        self.bound = 0.0  # no plan has less excess
        self._swap_one(points, spare)
        # The next edge would overrun; one saving elsewhere may pay for it.
        group = int(relaxed.edge_group[k])
        beyond = points.copy()
        beyond[group] = relaxed.points(k + 1)[group]
        self._swap_one(beyond, spare - int(self.added[group, beyond[group]]), keep=group)

    @property
    def gap(self) -> float:
        """The most by which the best plan found exceeds the optimum, nats per token."""
        gap = self.excess - self.bound
        return gap if gap > _EPSILON * self.excess and gap > self.rounding else 0.0
