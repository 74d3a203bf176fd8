"""What the allocator is asked and what it answers: a multiple-choice knapsack in integer bytes.

One item per fused group, one choice per item. Nothing here knows how costs were measured or what a format is:
both are columns of numbers with names, so the same code plans targets, sweeps and tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.errors import InputError

__all__ = ["AllocationProblem", "Plan"]

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
        self._require(allowed.any(axis=1, keepdims=True), "no format it can take", "Give it BF16 at least.")
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

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """(groups, formats): True where the group can take the format."""
        return ~np.isnan(self.cost)

    @property
    def smallest_bytes(self) -> int:
        """Bytes of the smallest plan there is."""
        return int(np.where(self.allowed, self.size, _MAX_TOTAL_BYTES).min(axis=1).sum())

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest useful plan: every group in its cheapest format, the smaller one of equals.

        No plan costs less than this one, so a larger budget buys nothing.
        """
        lowest = np.nanmin(self.cost, axis=1, keepdims=True)
        return int(np.where(self.cost == lowest, self.size, _MAX_TOTAL_BYTES).min(axis=1).sum())

    @property
    def maximum_bytes(self) -> int:
        """Bytes of the largest plan of any kind: every group in its largest format, also where that costs more."""
        return int(self.size.max(axis=1).sum())


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


def _require_unique(kind: str, names: tuple[str, ...]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"The {kind} {name} is listed twice; names must be unique.")
        seen.add(name)
