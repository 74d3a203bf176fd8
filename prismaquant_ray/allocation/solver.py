"""Exact multiple-choice knapsack: the cheapest format for every group within a budget of bytes.

Two steps. `Relaxation` prunes dominated choices, takes the lower convex hull of every group, and sorts all hull
edges once by cost saved per byte (Sinha & Zoltners 1979, "The multiple-choice knapsack problem"); a prefix of that
list is the Lagrangian optimum, so the linear bound of any budget is one binary search. `Solver.plan` then closes what
is left between the prefix and the bound: groups are merged one by one into a list of Pareto-optimal partial plans,
those likeliest to change first, and whatever cannot beat the best plan so far is dropped (Pisinger 1995, "A minimal
algorithm for the multiple-choice knapsack problem"). When nothing is left the plan is optimal.

The knapsack is NP-hard: instances whose costs are proportional to odd sizes can outlast any limit. Then the search
ends at `state_limit`, and the plan says how far from optimal it can be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.problem import (
    AllocationProblem,
    Floats,
    Ints,
    Plan,
    Relaxation,
    sorted_edges,
    spare_line,
)
from prismaquant_ray.errors import InputError

__all__ = ["Solver", "solve"]

_EPSILON = float(np.finfo(np.float64).eps)
# A narrow first pass finds a good plan; the second pass then has far less to prove.
_SCOUT_WIDTH = 1024
# The bound on what remains is rebuilt at most this often in one pass.
_REFRESHES = 256


class Solver:
    """Plans for any number of budgets from one relaxation.

    Args:
        problem: costs and sizes.
        gap_tolerance: relative gap at which a plan is good enough. 0.0 asks for the optimum.
        state_limit: partial plans one search may look into, a twentieth of them at a time. The default keeps the
            hardest instances below about 1 s a budget and 200 MB (benchmarks/allocator.py).
    """

    def __init__(self, problem: AllocationProblem, *, gap_tolerance: float = 0.0, state_limit: int = 3_000_000) -> None:
        self.relaxation = Relaxation.of(problem)
        self._gap_tolerance = gap_tolerance
        self._state_limit = state_limit

    def plan(self, budget_bytes: int) -> Plan:
        """The cheapest plan of at most `budget_bytes`.

        Costs are compared in float64: a gap of 0.0 means that no plan is cheaper by more than rounding. Among formats
        of one group with equal cost the smaller wins, then the first listed; the same input always gives the same
        plan. A budget above the largest useful plan gives that plan.

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
        # The optimum lies between the linear bound and the Lagrangian plan.
        above = float(relaxed.value[k])
        below = above - float(relaxed.slope[k]) * spare
        worth = max(self._gap_tolerance * min(abs(below), abs(above)), _EPSILON * abs(above))
        search = _Search(relaxed, k, spare, worth)
        for width in (_SCOUT_WIDTH, max(_SCOUT_WIDTH, self._state_limit // 20)):
            if not search.proven:
                search.run(width, self._state_limit)
        exact = search.proven and self._gap_tolerance <= _EPSILON
        return relaxed.plan(search.best, budget_bytes, 0.0 if exact else search.gap)


def solve(problem: AllocationProblem, budget_bytes: int) -> Plan:
    """The cheapest plan of at most `budget_bytes`; see `Solver.plan`, which shares its preparation among budgets."""
    return Solver(problem).plan(budget_bytes)


class _Step(NamedTuple):
    """Where the partial plans of one step came from."""

    group: int
    parent: NDArray[np.int32]  # (states,) index among the previous step's states
    point: NDArray[np.int16]  # (states,) the group's point


class _Search:
    """The search between the Lagrangian plan and the optimum, at one budget.

    With λ the slope at the budget, every point has a reduced cost r = Δcost + λ·Δsize ≥ 0 against the Lagrangian
    plan, and a plan with w spare bytes costs Σr + λ·w above the linear bound: its excess. The search looks for the
    least excess with w ≥ 0.
    """

    def __init__(self, relaxed: Relaxation, k: int, spare: int, worth: float) -> None:
        start = relaxed.points(k)
        self.slope = float(relaxed.slope[k])
        self.start, self.spare = start, spare
        self.added = relaxed.size - np.take_along_axis(relaxed.size, start[:, None], 1)
        change = relaxed.cost - np.take_along_axis(relaxed.cost, start[:, None], 1)
        price = self.slope * self.added
        reduced = change + price
        # Differences within rounding count as zero; otherwise ties would be searched in full.
        noise = 4 * _EPSILON * (np.abs(change) + np.abs(price))
        self.reduced = np.where(np.isinf(change) | (reduced > noise), reduced, 0.0)
        self.worth = worth  # smaller improvements are ignored
        self.floor = 0.0  # plans better than `excess - worth` have at least this excess
        self.best, self.excess = start, self.slope * spare
        # Alone, or with the next edge, which overruns the budget until another group pays for it.
        self._try_one_change(start)
        self._try_one_change(relaxed.points(k + 1))

    @property
    def proven(self) -> bool:
        """True when no plan is better by more than `worth`."""
        return self.floor >= self.excess - self.worth

    @property
    def gap(self) -> float:
        """The most by which the best plan found can exceed the optimum, nats per token."""
        return min(self.excess, max(self.worth, self.excess - self.floor))

    def run(self, width: int, state_limit: int) -> None:
        """Merge group after group, keeping at most `width` partial plans at a time.

        Lowers `excess` and updates `best` when a better plan is found, and raises `floor` to the best bound among the
        partial plans that were dropped for lack of room.
        """
        groups, least = self._core()
        rest = _Rest(self, groups)
        spare, cost = np.array([self.spare], dtype=np.int64), np.zeros(1)
        steps: list[_Step] = []
        dropped, stored = math.inf, 0
        trail: tuple[int, int] | None = None
        for rank, group in enumerate(groups.tolist()):
            limit = self.excess - self.worth
            if not len(spare):
                break
            if least[rank] >= limit:
                continue
            points = np.flatnonzero(self.reduced[group] < limit)
            count = len(spare)
            spare = (spare - self.added[group, points][:, None]).ravel()
            cost = (cost + self.reduced[group, points][:, None]).ravel()
            total = cost + self.slope * spare
            found = _cheapest_that_fits(total, spare, self.excess)
            if found is not None:
                self.excess = float(total[found])
            bound = cost + rest.least_excess(rank, spare)
            keep = np.flatnonzero(bound < self.excess - self.worth)
            keep = keep[_undominated(spare[keep], total[keep])]
            stored += len(keep)
            keep, lost = _narrow(keep, bound, width if stored <= state_limit else 0)
            dropped = min(dropped, lost)
            kept = keep
            if found is not None:
                # Stored for the walk back only: it is a complete plan.
                trail = (len(steps), len(keep))
                kept = np.append(keep, found)
            steps.append(_Step(group, (kept % count).astype(np.int32), points[kept // count].astype(np.int16)))
            spare, cost = spare[keep], cost[keep]
        if trail is not None:
            self.best = self._walk_back(steps[: trail[0] + 1], trail[1])
        self.floor = max(self.floor, dropped)

    def _core(self) -> tuple[Ints, Floats]:
        """Groups that a better plan may change, and the least reduced cost of changing each.

        Those with the least reduced cost per byte come first: the steeper the remaining groups, the more it costs a
        partial plan to be far from the budget, and the more of them can be dropped (Pisinger's order).
        """
        changes = self.reduced.copy()
        np.put_along_axis(changes, self.start[:, None], np.inf, axis=1)
        least = changes.min(axis=1)
        limit = self.excess - self.worth
        groups = np.flatnonzero(least < limit)
        changes, added = changes[groups], np.abs(self.added[groups])
        per_byte = np.where(changes < limit, changes, np.inf) / np.maximum(added, 1)
        groups = groups[np.argsort(per_byte.min(axis=1), kind="stable")]
        return groups, least[groups]

    def _try_one_change(self, points: Ints) -> None:
        """Take the best plan that differs from `points` in at most one group, if it fits and is better."""
        at = points[:, None]
        added = self.added - np.take_along_axis(self.added, at, 1)
        reduced = self.reduced - np.take_along_axis(self.reduced, at, 1)
        rows = np.arange(len(points))
        spare = self.spare - int(self.added[rows, points].sum()) - added
        total = float(self.reduced[rows, points].sum()) + reduced + self.slope * spare
        found = _cheapest_that_fits(total.ravel(), spare.ravel(), self.excess)
        if found is not None:
            self.excess = float(total.flat[found])
            group, point = divmod(found, self.added.shape[1])
            self.best = points.copy()
            self.best[group] = point

    def _walk_back(self, steps: list[_Step], state: int) -> Ints:
        points = self.start.copy()
        for step in reversed(steps):
            points[step.group] = step.point[state]
            state = int(step.parent[state])
        return points


class _Rest:
    """Linear relaxation of the groups not merged yet: a lower bound on the excess, by spare bytes."""

    def __init__(self, search: _Search, groups: Ints) -> None:
        self._slope = search.slope
        self._refresh = max(1, len(groups) // _REFRESHES)
        start = search.start[groups]
        points = np.arange(search.added.shape[1])
        added, reduced = search.added[groups], search.reduced[groups].copy()
        reduced[reduced >= search.excess - search.worth] = np.inf
        np.put_along_axis(reduced, start[:, None], 0.0, axis=1)
        # Growing uses spare bytes; shrinking pays back an overrun. The two are mirror images.
        grow = np.where(points >= start[:, None], reduced, np.inf)
        shrink = np.where(points <= start[:, None], reduced, np.inf)[:, ::-1]
        self._grow = sorted_edges(added, grow, start)
        self._shrink = sorted_edges(-added[:, ::-1], shrink, len(points) - 1 - start)
        self._overrun, self._at = np.zeros(1), np.zeros(1)

    def least_excess(self, rank: int, spare: Ints) -> Floats:
        """(states,) lower bound on the excess that groups after `rank` and unused bytes add; inf if nothing fits."""
        if rank % self._refresh == 0:
            self._at, self._overrun = spare_line(self._grow, self._shrink, rank, self._slope)
        return np.interp(spare, self._at, self._overrun, left=np.inf)


def _cheapest_that_fits(total: Floats, spare: Ints, limit: float) -> int | None:
    """Index of the least total below the limit without an overrun, the smallest plan among equals."""
    fits = np.where(spare >= 0, total, np.inf)
    least = fits.min()
    if not least < limit:
        return None
    ties = np.flatnonzero(fits == least)
    return int(ties[np.argmax(spare[ties])])


def _narrow(keep: Ints, bound: Floats, width: int) -> tuple[Ints, float]:
    """The `width` most promising states in their order, and the best bound among the others."""
    if len(keep) <= width:
        return keep, math.inf
    best_first = np.argsort(bound[keep], kind="stable")
    return keep[np.sort(best_first[:width])], float(bound[keep[best_first[width]]])


def _undominated(spare: Ints, total: Floats) -> Ints:
    """Indices of the Pareto-optimal states, by falling spare bytes."""
    order = np.argsort(-spare, kind="stable")
    total = total[order]
    lower = np.ones(len(order), dtype=bool)
    lower[1:] = total[1:] < np.minimum.accumulate(total)[:-1]
    order = order[lower]
    last_of_equals = np.ones(len(order), dtype=bool)
    last_of_equals[:-1] = spare[order[:-1]] != spare[order[1:]]
    return order[last_of_equals]
