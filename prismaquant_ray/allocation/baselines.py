"""Baselines: plans of the same size that ignore the prices, or use other prices.

One format for all groups; an even mixture of two formats, at least as large as the plan that it is compared with; and
the plan of the objective `fisher_trace` for the same budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.allocation.frontier import sweep
from prismaquant_ray.allocation.plans import Choice, Planner
from prismaquant_ray.config import BudgetConfig
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.records import PlanRecord

# Multiples of the golden ratio, modulo 1, are spread evenly over depth for any number of steps.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledPlan:
    """A plan or baseline to be measured; `target` is the budget it belongs to, None for one format throughout."""

    kind: Literal["plan", "uniform", "mixture", "fisher_trace"]
    label: str
    target: str | None
    objective: Literal["token_fisher", "fisher_trace"] | None
    choice: Choice

    @classmethod
    def of(cls, plan: PlanRecord) -> LabelledPlan:
        """The plan of a record, labelled with its target."""
        return cls(kind="plan", label=plan.target, target=plan.target, objective=plan.objective, choice=plan.choice)


def baselines(planner: Planner, targets: Sequence[PlanRecord]) -> Iterator[LabelledPlan]:
    """Every baseline of the plans of a sweep."""
    sizes, layout = planner.sizes, planner.layout
    for name in sizes.formats:
        if FORMATS[name].codec is not None:
            choice = _choice(layout, sizes, _uniform(sizes, name))
            yield LabelledPlan(kind="uniform", label=f"all {name}", target=None, objective=None, choice=choice)
    for plan in targets:
        columns = _evenly_mixed(sizes, plan.weight_bytes)
        if columns is not None:
            label, choice = f"{plan.target}, evenly mixed", _choice(layout, sizes, columns)
            yield LabelledPlan(kind="mixture", label=label, target=plan.target, objective=None, choice=choice)
    budgets = [BudgetConfig(bpp=float(plan.target.removesuffix("bpp"))) for plan in targets]
    trace = np.where(sizes.allowed, planner.table.fisher_trace, np.nan)
    problem = planner.problem(budgets[0]).with_cost(trace)
    found = sweep(problem, [sizes.limit(budget) for budget in budgets], sizes.second)
    for plan, other in zip(targets, found, strict=True):
        yield LabelledPlan(
            kind="fisher_trace",
            label=f"{plan.target}, by fisher_trace",
            target=plan.target,
            objective="fisher_trace",
            choice={group: FormatName(name) for group, name in other.choice.items()},
        )


def _choice(layout: Layout, sizes: Sizes, columns: NDArray[np.int64]) -> Choice:
    return {group.name: sizes.formats[column] for group, column in zip(layout.groups, columns, strict=True)}


def _uniform(sizes: Sizes, name: FormatName) -> NDArray[np.int64]:
    """Column of each group: the format, or the smallest allowed one where the group cannot take it."""
    smallest = np.where(sizes.allowed, sizes.weights, np.iinfo(np.int64).max).argmin(axis=1)
    column = sizes.formats.index(name)
    return np.where(sizes.allowed[:, column], column, smallest)


def _evenly_mixed(sizes: Sizes, least: int) -> NDArray[np.int64] | None:
    """A mixture of two formats of neighbouring size, spread evenly over depth, with at least `least` bytes of weights.

    None when the smallest format already has `least` bytes, or no such mixture reaches them.
    """
    rows = np.arange(len(sizes.weights))
    uniform = sorted((_uniform(sizes, name) for name in sizes.formats), key=lambda c: int(sizes.weights[rows, c].sum()))
    weights = [int(sizes.weights[rows, columns].sum()) for columns in uniform]
    for small, large, low, high in zip(uniform, uniform[1:], weights, weights[1:], strict=False):
        if not low < least <= high:
            continue
        columns, total = small.copy(), low
        for row in np.argsort((rows + 1) * _GOLDEN % 1.0, kind="stable"):
            if total >= least:
                break
            total += int(sizes.weights[row, large[row]] - sizes.weights[row, small[row]])
            columns[row] = large[row]
        return columns
    return None
