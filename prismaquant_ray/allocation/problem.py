"""The allocation problem, its solution, and the linear relaxation in between.

A multiple-choice knapsack in integer bytes: one item per fused group, one choice per item. Nothing here knows how
costs were measured or what a format is: both are columns of numbers with names, so the same code plans targets,
sweeps and tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.errors import InputError

__all__ = [
    "AllocationProblem",
    "Floats",
    "HullEdges",
    "Ints",
    "Plan",
    "Relaxation",
    "lower_hull",
    "sorted_edges",
    "spare_line",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Totals stay exact in int64 with room for differences.
_MAX_TOTAL_BYTES = 2**62


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AllocationProblem:
    """Predicted loss and exact size of every fused group in every format.

    Row i is groups[i], column j is formats[j]. A NaN cost marks a format the group cannot take; its size is then
    ignored. Costs may be negative (measurement noise) and a larger format may cost more. Both arrays are copied and
    made read-only.

    Raises:
        InputError: a shape or dtype does not fit, a name occurs twice, a cost is infinite, a size is negative,
            or a group has no format. The message names the group.
    """

    groups: tuple[str, ...]
    formats: tuple[str, ...]
    cost: NDArray[np.float64]  # (groups, formats) nats per token
    size: NDArray[np.int64]  # (groups, formats) bytes

    def __post_init__(self) -> None:
        shape = (len(self.groups), len(self.formats))
        if 0 in shape:
            raise InputError(f"Nothing to allocate: {shape[0]} groups and {shape[1]} formats; both need at least one.")
        _require_unique("group", self.groups)
        _require_unique("format", self.formats)
        cost, size = np.array(self.cost), np.array(self.size)
        for name, array, kinds in (("cost", cost, "fiu"), ("size", size, "iu")):
            if array.shape != shape:
                raise InputError(f"The {name} table has shape {array.shape}; the groups and formats need {shape}.")
            if array.dtype.kind not in kinds:
                raise InputError(f"The {name} table has dtype {array.dtype}; costs are float64 and sizes whole bytes.")
        cost = cost.astype(np.float64)
        allowed = ~np.isnan(cost)
        self._require(~np.isinf(cost), "an infinite cost", "Mark a format it cannot take with NaN.")
        self._require((size >= 0) | ~allowed, "a negative size", "Sizes are bytes on disk.")
        self._require(np.any(allowed, axis=1)[:, None], "no format it can take", "Give it BF16 at least.")
        if np.where(allowed, size, 0).max(axis=1).astype(np.float64).sum() >= _MAX_TOTAL_BYTES:
            raise InputError("The sizes add up to more than 2^62 bytes; they are bytes per group, not bits or totals.")
        size = np.where(allowed, size, 0).astype(np.int64)
        cost.setflags(write=False)
        size.setflags(write=False)
        object.__setattr__(self, "cost", cost)
        object.__setattr__(self, "size", size)

    def _require(self, holds: NDArray[np.bool_], problem: str, remedy: str) -> None:
        """Raise InputError naming the first group (and format, when there is a column for it) that fails."""
        if holds.all():
            return
        row, column = (int(index) for index in np.argwhere(~holds)[0])
        where = f" in {self.formats[column]}" if holds.shape[1] == len(self.formats) > 1 else ""
        raise InputError(f"Group {self.groups[row]} has {problem}{where}. {remedy}")

    def with_cost(self, cost: Floats) -> AllocationProblem:
        """The same groups, formats and sizes at other costs; NaN may forbid more."""
        return AllocationProblem(groups=self.groups, formats=self.formats, cost=cost, size=self.size)

    def columns(self, choice: Mapping[str, str]) -> Ints:
        """(groups,) column of every group's format."""
        of = {name: column for column, name in enumerate(self.formats)}
        return np.array([of[choice[group]] for group in self.groups], dtype=np.int64)

    def plan(self, columns: Ints, budget: int, slack: float) -> Plan:
        """The plan with these columns, at most `slack` nats per token above the optimum for the budget."""
        rows = np.arange(len(columns))
        cost = math.fsum(self.cost[rows, columns].tolist())
        return Plan(
            choice={group: self.formats[j] for group, j in zip(self.groups, columns.tolist(), strict=True)},
            cost=cost,
            size=int(self.size[rows, columns].sum()),
            bound=cost - slack,
            gap=slack / max(abs(cost), math.ulp(0.0)),
            budget=budget,
        )

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """(groups, formats): True where the group can take the format."""
        return ~np.isnan(self.cost)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest useful plan: every group in its cheapest format, the smaller one of equals.

        No plan costs less than this one, so a larger budget buys nothing.
        """
        lowest = np.nanmin(self.cost, axis=1, keepdims=True)
        return int(np.where(self.cost == lowest, self.size, _MAX_TOTAL_BYTES).min(axis=1).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A format for every fused group, and how far from the best such plan it can be.

    Attributes:
        choice: group to format, in the order of the problem's groups.
        cost: predicted loss increase, nats per token: math.fsum of the chosen entries.
        size: bytes of the plan; never above `budget`.
        bound: no plan within `budget` costs less than this, nats per token. Equal to `cost` when proven optimal.
        gap: (cost − bound) / |cost|; 0.0 when proven optimal.
        budget: bytes the plan was made for.
    """

    choice: dict[str, str]
    cost: float
    size: int
    bound: float
    gap: float
    budget: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Relaxation:
    """The linear relaxation of a problem for every budget at once (Sinha & Zoltners 1979).

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
        hull = lower_hull(size, cost, np.zeros(len(size), dtype=np.int64))
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
        return self.problem.plan(self.column[np.arange(len(points)), points], budget, slack)


def lower_hull(size: Ints, cost: Floats, start: Ints) -> Ints:
    """(groups, points) vertices of every row's lower convex hull from `start` to the right; the last one repeats.

    Sizes rise along a row; points of infinite cost do not count. Gift wrapping, all rows at once.
    """
    points = np.arange(size.shape[1])
    vertices = [start]
    for _ in points[1:]:
        at = vertices[-1][:, None]
        ahead = (points > at) & np.isfinite(cost)
        if not ahead.any():
            break
        run = np.where(ahead, size - np.take_along_axis(size, at, 1), 1)
        slope = np.where(ahead, cost - np.take_along_axis(cost, at, 1), np.inf) / run
        farthest_of_steepest = points[-1] - np.argmin(slope[:, ::-1], axis=1)
        vertices.append(np.where(ahead.any(axis=1), farthest_of_steepest, vertices[-1]))
    return np.stack(vertices, axis=1)


class HullEdges(NamedTuple):
    """Edges of the lower hulls of several groups, cheapest by size first."""

    rank: Ints  # (edges,) position of the edge's group among the groups
    size: Ints  # (edges,)
    cost: Floats  # (edges,)


def sorted_edges(size: Ints, cost: Floats, start: Ints) -> HullEdges:
    """Edges of every row's hull to the right of `start`, see `lower_hull`, by rising slope."""
    hull = lower_hull(size, cost, start)
    hull_size, hull_cost = np.take_along_axis(size, hull, 1), np.take_along_axis(cost, hull, 1)
    rank, step = np.nonzero(np.diff(hull, axis=1))
    added = hull_size[rank, step + 1] - hull_size[rank, step]
    extra = hull_cost[rank, step + 1] - hull_cost[rank, step]
    order = np.argsort(extra / added, kind="stable")
    return HullEdges(rank[order], added[order], extra[order])


def spare_line(grow: HullEdges, shrink: HullEdges, rank: int, price: float) -> tuple[Floats, Floats]:
    """Least cost of groups after `rank`, by the units that are spare: points of it, falling short first.

    `grow` uses spare units, `shrink` pays back an overrun; units beyond what groups can use cost `price` each.
    """
    room, room_cost = _cumulated(grow, rank)
    debt, debt_cost = _cumulated(shrink, rank)
    at = np.concatenate([-debt[::-1], room[1:], [room[-1] + 2.0**63]])
    return at, np.concatenate([debt_cost[::-1], room_cost[1:], [room_cost[-1] + price * 2.0**63]])


def _cumulated(edges: HullEdges, rank: int) -> tuple[Ints, Floats]:
    """Size and cost after each of the edges of groups after `rank`, from zero."""
    later = edges.rank > rank
    return (
        np.concatenate([[0], np.cumsum(edges.size[later])]),
        np.concatenate([[0.0], np.cumsum(edges.cost[later])]),
    )


def _pareto_points(problem: AllocationProblem) -> tuple[Ints, Floats, Ints]:
    """Sizes, costs and columns of non-dominated formats, smallest first: cost falls strictly along a row."""
    allowed = problem.allowed
    size = np.where(allowed, problem.size, np.iinfo(np.int64).max)
    cost = np.where(allowed, problem.cost, np.inf)
    column = np.lexsort((cost, size), axis=1)
    ordered = np.take_along_axis(cost, column, 1)
    kept = np.isfinite(ordered)
    kept[:, 1:] &= ordered[:, 1:] < np.minimum.accumulate(ordered, axis=1)[:, :-1]
    column = np.take_along_axis(column, np.argsort(~kept, axis=1, kind="stable"), 1)
    valid = np.arange(kept.shape[1]) < kept.sum(axis=1)[:, None]
    width = int(kept.sum(axis=1).max())
    size = np.where(valid, np.take_along_axis(problem.size, column, 1), 0)
    cost = np.where(valid, np.take_along_axis(problem.cost, column, 1), np.inf)
    return size[:, :width], cost[:, :width], column[:, :width]


def _require_unique(kind: str, names: tuple[str, ...]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"The {kind} {name} is listed twice; names must be unique.")
        seen.add(name)
