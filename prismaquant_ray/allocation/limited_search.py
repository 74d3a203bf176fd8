"""The search for the cheapest plan within several limits, from the prices of the Lagrangian dual.

It is the search of `solver` with a vector of spare units in place of spare bytes: groups are merged one by one into
partial plans, those likeliest to change first, and what cannot beat the best plan so far is dropped (Pisinger 1995,
"A minimal algorithm for the multiple-choice knapsack problem"). When nothing is left, the plan is optimal; otherwise
the best bound among the partial plans that were dropped for lack of room is the plan's bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.dual import Dual
from prismaquant_ray.allocation.limits import Limit
from prismaquant_ray.allocation.problem import AllocationProblem, Floats, HullEdges, Ints, sorted_edges, spare_line

__all__ = ["LimitedSearch"]

_EPSILON = float(np.finfo(np.float64).eps)
# The bounds on what remains are rebuilt at most this often in one run.
_REFRESHES = 64
# Thresholds, over all limits but the first, at which partial plans are compared: more find more that are dominated.
_THRESHOLDS = 64


class _Step(NamedTuple):
    """Where the partial plans of one step came from."""

    group: int
    parent: NDArray[np.int32]  # (states,) index among the previous step's states
    column: NDArray[np.int16]  # (states,) the group's format


class LimitedSearch:
    """Plans better than the dual's, within the limits.

    With prices p of the limits every format has a reduced cost r ≥ 0 against the cheapest at these prices, and a plan
    with w spare units costs Σr + p·w above the dual's bound: its excess. The search looks for the least excess with
    w ≥ 0.
    """

    def __init__(self, problem: AllocationProblem, limits: Sequence[Limit], dual: Dual) -> None:
        cost = np.where(problem.allowed, problem.cost, np.inf)
        use = np.stack([limit.use for limit in limits])
        priced = cost + np.tensordot(dual.prices, use, 1)
        start = priced.argmin(axis=1)
        rows = np.arange(len(start))
        self.start, self.columns = start, dual.columns
        self.prices = dual.prices
        self.added = use - use[:, rows, start][:, :, None]  # (limits, groups, formats)
        self.spare = np.array([limit.limit - limit.used(start) for limit in limits], dtype=np.int64)
        reduced = priced - priced[rows, start][:, None]
        noise = 4 * _EPSILON * (np.abs(cost) + np.tensordot(dual.prices, np.abs(use), 1))
        self.reduced = np.where(np.isinf(cost) | (reduced > noise), reduced, 0.0)
        best = math.fsum(cost[rows, dual.columns].tolist())
        self.worth = 16 * _EPSILON * (abs(best) + float(dual.prices @ np.abs([limit.limit for limit in limits])))
        self.excess = best - dual.bound
        self.floor = 0.0  # plans better than `excess - worth` have at least this excess

    @property
    def proven(self) -> bool:
        """True when no plan is better by more than rounding."""
        return self.floor >= self.excess - self.worth

    @property
    def gap(self) -> float:
        """The most by which the best plan found can exceed the optimum, nats per token."""
        return 0.0 if self.proven else min(self.excess, self.excess - self.floor)

    def run(self, width: int, state_limit: int) -> None:
        """Merge group after group, keeping at most `width` partial plans at a time, `state_limit` in all.

        Lowers `excess` and updates `columns` when a better plan is found, and raises `floor` to the best bound among
        the partial plans that were dropped for lack of room.
        """
        groups, least = self._core()
        rest = [_Rest(self, groups, limit) for limit in range(len(self.spare))]
        spare, cost = self.spare[:, None], np.zeros(1)
        steps: list[_Step] = []
        dropped, stored = math.inf, 0
        trail: tuple[int, int] | None = None
        for rank, group in enumerate(groups.tolist()):
            allowed = self.excess - self.worth
            if not len(cost):
                break
            if least[rank] >= allowed:
                continue
            formats = np.flatnonzero(self.reduced[group] < allowed)
            count = len(cost)
            spare = (spare[:, None, :] - self.added[:, group, formats][:, :, None]).reshape(len(spare), -1)
            cost = (self.reduced[group, formats][:, None] + cost).ravel()
            total = cost + self.prices @ spare
            found = _cheapest_that_fits(total, spare, self.excess)
            if found is not None:
                self.excess = float(total[found])
            bound = cost + np.max([each.least_excess(rank, units) for each, units in zip(rest, spare, strict=True)], 0)
            keep = np.flatnonzero(bound < self.excess - self.worth)
            keep = keep[_undominated(spare[:, keep], total[keep])]
            stored += len(keep)
            keep, lost = _narrowed(keep, bound, width if stored <= state_limit else 0)
            dropped = min(dropped, lost)
            kept = keep
            if found is not None:
                # Stored for the walk back only: it is a complete plan.
                trail = (len(steps), len(keep))
                kept = np.append(keep, found)
            steps.append(_Step(group, (kept % count).astype(np.int32), formats[kept // count].astype(np.int16)))
            spare, cost = spare[:, keep], cost[keep]
        if trail is not None:
            self.columns = self._walk_back(steps[: trail[0] + 1], trail[1])
        self.floor = max(self.floor, dropped)

    def _core(self) -> tuple[Ints, Floats]:
        """Groups that a better plan may change, and the least reduced cost of changing each.

        Those with the least reduced cost for the price of what they change come first, as in Pisinger's order.
        """
        changes = self.reduced.copy()
        np.put_along_axis(changes, self.start[:, None], np.inf, axis=1)
        least = changes.min(axis=1)
        allowed = self.excess - self.worth
        groups = np.flatnonzero(least < allowed)
        worth = np.tensordot(self.prices, np.abs(self.added[:, groups]), 1)
        by_price = np.where(changes[groups] < allowed, changes[groups], np.inf) / np.maximum(worth, 1e-300)
        groups = groups[np.argsort(by_price.min(axis=1), kind="stable")]
        return groups, least[groups]

    def _walk_back(self, steps: list[_Step], state: int) -> Ints:
        columns: Ints = self.start.copy()
        for step in reversed(steps):
            columns[step.group] = step.column[state]
            state = int(step.parent[state])
        return columns


class _Rest:
    """Linear relaxation of the groups not merged yet under one limit: a lower bound on the excess, by spare units."""

    def __init__(self, search: LimitedSearch, groups: Ints, limit: int) -> None:
        self._price = float(search.prices[limit])
        self._refresh = max(1, len(groups) // _REFRESHES)
        added, reduced = search.added[limit, groups], search.reduced[groups]
        reduced = np.where(reduced < search.excess - search.worth, reduced, np.inf)
        # Growing uses spare units; shrinking pays back an overrun. The two are mirror images.
        grow, self._shrink = _rising(added, reduced), _rising(-added, reduced)
        # Units that cost more to use than to leave are left.
        worth = grow.cost < self._price * grow.size
        self._grow = HullEdges(grow.rank[worth], grow.size[worth], grow.cost[worth])
        self._overrun, self._at = np.zeros(1), np.zeros(1)

    def least_excess(self, rank: int, spare: Ints) -> Floats:
        """(states,) lower bound on the excess that groups after `rank` and unused units add; inf if nothing fits."""
        if rank % self._refresh == 0:
            self._at, self._overrun = spare_line(self._grow, self._shrink, rank, self._price)
        return np.interp(spare, self._at, self._overrun, left=np.inf)


def _rising(added: Ints, reduced: Floats) -> HullEdges:
    """Hull edges of every group from no change to the formats that add units."""
    order = np.lexsort((reduced, added), axis=1)
    size, cost = np.take_along_axis(added, order, 1), np.take_along_axis(reduced, order, 1)
    # Of formats with the same use the cheapest counts, and the first point is no change at all.
    again = np.zeros(size.shape, dtype=bool)
    again[:, 1:] = size[:, 1:] == size[:, :-1]
    cost = np.where((size > 0) & ~again, cost, np.inf)
    size, cost = np.pad(np.maximum(size, 0), ((0, 0), (1, 0))), np.pad(cost, ((0, 0), (1, 0)))
    return sorted_edges(size, cost, np.zeros(len(size), dtype=np.int64))


def _cheapest_that_fits(total: Floats, spare: Ints, limit: float) -> int | None:
    """Index of the least total below the limit without an overrun, the smallest plan among equals."""
    fits = np.where((spare >= 0).all(axis=0), total, np.inf)
    least = fits.min()
    if not least < limit:
        return None
    ties = np.flatnonzero(fits == least)
    return int(ties[np.argmax(spare[0, ties])])


def _narrowed(keep: Ints, bound: Floats, width: int) -> tuple[Ints, float]:
    """The `width` most promising states in their order, and the best bound among the others."""
    if len(keep) <= width:
        return keep, math.inf
    best_first = np.argsort(bound[keep], kind="stable")
    return keep[np.sort(best_first[:width])], float(bound[keep[best_first[width]]])


def _undominated(spare: Ints, total: Floats) -> Ints:
    """Indices of states that no other state is seen to dominate: as much spare of everything, at no higher total.

    Exact for one limit. Of more, the others are compared at thresholds: some dominated states may be left, none that is
    not is dropped.
    """
    order = np.lexsort((total, *-spare[:0:-1], -spare[0]))
    spare, total = spare[:, order], total[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (spare[:, 1:] != spare[:, :-1]).any(axis=0)
    order, spare, total = order[first], spare[:, first], total[first]
    dominated = np.zeros(len(order), dtype=bool)
    each = round(_THRESHOLDS ** (1 / max(1, len(spare) - 1)))
    for reached, above in _thresholds(spare[1:], each):
        # The least total of the states before it that have at least the threshold of everything.
        before = np.minimum.accumulate(np.where(above, total, np.inf))
        dominated[1:] |= reached[1:] & (before[:-1] <= total[1:])
    return order[~dominated]


def _thresholds(spare: Ints, each: int) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """For thresholds of all limits (limits, states): the states below or at them, and those above or at them."""
    chosen = []
    for units in spare:
        distinct = np.unique(units)
        chosen.append(distinct[np.unique(np.linspace(0, len(distinct) - 1, min(each, len(distinct))).astype(np.int64))])
    for threshold in itertools.product(*chosen):
        at = np.array(threshold, dtype=np.int64)[:, None]
        yield np.all(spare <= at, axis=0), np.all(spare >= at, axis=0)
