"""From a plan to one that no change of one or two groups improves, within every resource."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prismaquant_ray.allocation.problem import Floats, Ints

__all__ = ["Resource", "improved"]

# A change must lower the cost by more than rounding, or equal plans could take turns.
_WORTH = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Resource:
    """What every choice takes, `use` (groups, formats) int64, and how much a plan may take."""

    use: Ints
    limit: int


def improved(columns: Ints, cost: Floats, *, resources: Sequence[Resource]) -> Ints:
    """Columns (groups,) of a plan that no change of one group, or of two at once, makes cheaper within the resources.

    A plan costs Σ cost[g, f(g)], NaN where a format is not allowed. Every step takes the change that saves most, the
    first among equals, so the result is a function of the input. The plan given must keep the resources.
    """
    groups, formats = cost.shape
    group_of = np.repeat(np.arange(groups), formats)
    apart = group_of[:, None] != group_of
    columns = columns.copy()
    while True:
        now = np.arange(groups) * formats + columns
        change = cost - cost.ravel()[now][:, None]
        single = np.where(np.isnan(change), np.inf, change).ravel()
        double = single[:, None] + single
        # The current format stands for no change: pairs with it are changes of one group.
        is_now = np.zeros(groups * formats, dtype=bool)
        is_now[now] = True
        fits = apart | is_now
        for resource in resources:
            use = resource.use.ravel()
            added = use - use[now][group_of]
            fits &= added[:, None] + added <= resource.limit - int(use[now].sum())
        double = np.where(fits, double, np.inf)
        best = int(np.argmin(double))
        total = float(np.abs(cost.ravel()[now]).sum())
        if not double.flat[best] < -_WORTH * total:
            return columns
        for choice in divmod(best, groups * formats):
            group, column = divmod(choice, formats)
            if not is_now[choice]:
                columns[group] = column
