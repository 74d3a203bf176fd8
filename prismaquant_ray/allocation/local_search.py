"""Local search: improve a plan by changing one or two groups at a time, within every limit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prismaquant_ray.allocation.limits import Limit
from prismaquant_ray.allocation.problem import Floats, Ints

__all__ = ["improved"]

# A change must lower the cost by more than rounding, or the search could alternate between equal plans.
_WORTH = 1e-12


def improved(columns: Ints, cost: Floats, *, limits: Sequence[Limit]) -> Ints:
    """Columns (groups,) of a plan that is optimal under changes of one or two groups within the limits.

    A plan costs Σ cost[g, f(g)], NaN where a format is not allowed. Every step takes the change that saves most, the
    first among equals, so the result is deterministic. The given plan must keep the limits.
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
        for limit in limits:
            use = limit.use.ravel()
            added = use - use[now][group_of]
            fits &= added[:, None] + added <= limit.limit - int(use[now].sum())
        double = np.where(fits, double, np.inf)
        best = int(np.argmin(double))
        total = float(np.abs(cost.ravel()[now]).sum())
        if not double.flat[best] < -_WORTH * total:
            return columns
        for choice in divmod(best, groups * formats):
            group, column = divmod(choice, formats)
            if not is_now[choice]:
                columns[group] = column
