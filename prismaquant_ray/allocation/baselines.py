"""Baselines: plans of the same size that ignore the prices, or use other prices.

One format for all groups; the mixture that vendors ship by hand, NVFP4 in the MLPs and FP8 in the rest of a layer; an
even mixture of two formats, at least as large as the plan that it is compared with; and the plan of the objective
`fisher_trace` for the same budget and limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.allocation.frontier import sweep
from prismaquant_ray.allocation.plans import Choice, Planner
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Block, BlockKind, FusedGroup, Layout
from prismaquant_ray.records import CacheType, PlanKind, PlanRecord
from prismaquant_ray.settings.budget import BudgetConfig

# Multiples of the golden ratio, modulo 1, are spread evenly over depth for any number of steps.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledPlan:
    """A plan or baseline to be measured; `target` is the budget it belongs to, None for one format throughout.

    `kv_cache` is the type of its KV cache: a baseline's is the plans' own.
    """

    kind: PlanKind
    label: str
    target: str | None
    objective: Literal["token_fisher", "fisher_trace"] | None
    choice: Choice
    kv_cache: CacheType = "bf16"

    @classmethod
    def of(cls, plan: PlanRecord) -> LabelledPlan:
        """The plan of a record, labelled with its target."""
        return cls(
            kind="plan",
            label=plan.target,
            target=plan.target,
            objective=plan.objective,
            choice=plan.choice,
            kv_cache=plan.kv_cache,
        )


def baselines(planner: Planner, targets: Sequence[PlanRecord]) -> Iterator[LabelledPlan]:
    """Every baseline of the plans of a sweep, with their type of KV cache."""
    for baseline in _baselines(planner, targets):
        yield replace(baseline, kv_cache=planner.fixed_cache)


def _baselines(planner: Planner, targets: Sequence[PlanRecord]) -> Iterator[LabelledPlan]:
    sizes, layout = planner.sizes, planner.layout
    for name in sizes.formats:
        if FORMATS[name].codec is not None:
            choice = _choice(layout, sizes, uniform_columns(sizes, name))
            yield LabelledPlan(kind="uniform", label=f"all {name}", target=None, objective=None, choice=choice)
    mixed = vendor_mixture(layout, sizes)
    if mixed is not None:
        yield mixed
    for plan in targets:
        columns = _evenly_mixed(planner, plan.weight_bytes)
        if columns is not None:
            label, choice = f"{plan.target}, evenly mixed", _choice(layout, sizes, columns)
            yield LabelledPlan(kind="mixture", label=label, target=plan.target, objective=None, choice=choice)
    budgets = [BudgetConfig(bpp=float(plan.target.removesuffix("bpp"))) for plan in targets]
    trace = np.where(sizes.allowed, planner.table.fisher_trace, np.nan)
    problem = planner.problem(budgets[0]).with_cost(trace)
    found = sweep(problem, [sizes.limit(budget) for budget in budgets], planner.limits)
    for plan, other in zip(targets, found, strict=True):
        yield LabelledPlan(
            kind="fisher_trace",
            label=f"{plan.target}, by fisher_trace",
            target=plan.target,
            objective="fisher_trace",
            choice={group: FormatName(name) for group, name in other.choice.items()},
        )


def vendor_mixture(layout: Layout, sizes: Sizes) -> LabelledPlan | None:
    """The mixture of NVIDIA's own checkpoints; None unless both of its formats are among the run's.

    Linears of a layer's MLP, experts included, are NVFP4, the others of the layer FP8. Where a group cannot take its
    format, it has the smallest that it can.
    """
    mlp, attention = FormatName.NVFP4, FormatName.FP8
    if not {mlp, attention} <= {*sizes.formats}:
        return None
    # Outside the layers nothing is quantized, where that is a choice.
    kept = FormatName.BF16 if FormatName.BF16 in sizes.formats else attention
    columns = {name: uniform_columns(sizes, name) for name in (mlp, attention, kept)}
    choice = {}
    for row, group in enumerate(layout.groups):
        block = layout.block_of[group.name]
        inside = kept if block.kind is not BlockKind.DECODER else mlp if _in_mlp(block, group) else attention
        choice[group.name] = sizes.formats[columns[inside][row]]
    label = f"MLP {mlp}, attention {attention}"
    return LabelledPlan(kind="by_hand", label=label, target=None, objective=None, choice=choice)


def _in_mlp(block: Block, group: FusedGroup) -> bool:
    """Whether a group is of the MLP: the module of a layer that runs last, with its experts."""
    return group.experts is not None or _module(block, group) == _module(block, block.groups[-1])


def _module(block: Block, group: FusedGroup) -> str:
    """The module of a layer that holds a group; empty for the layer itself."""
    inside = group.linears[0].name.removeprefix(f"{block.prefix}.")
    return inside.partition(".")[0] if "." in inside else ""


def _choice(layout: Layout, sizes: Sizes, columns: NDArray[np.int64]) -> Choice:
    return {group.name: sizes.formats[column] for group, column in zip(layout.groups, columns, strict=True)}


def uniform_columns(sizes: Sizes, name: FormatName) -> NDArray[np.int64]:
    """Columns (groups,) of one format throughout, or the smallest allowed one where a group cannot take it."""
    smallest = np.where(sizes.allowed, sizes.weights, np.iinfo(np.int64).max).argmin(axis=1)
    column = sizes.formats.index(name)
    return np.where(sizes.allowed[:, column], column, smallest)


def _evenly_mixed(planner: Planner, least: int) -> NDArray[np.int64] | None:
    """A mixture of two formats of neighbouring size, spread evenly over depth, with at least `least` bytes of weights.

    None when the smallest format already has `least` bytes, or no such mixture reaches them. Under limits the fastest
    of formats with the same bytes is mixed.
    """
    sizes = planner.sizes
    rows, prefill = np.arange(len(sizes.weights)), planner.times.prefill * bool(planner.limits)
    uniform = sorted(
        (uniform_columns(sizes, name) for name in sizes.formats),
        key=lambda columns: (int(sizes.weights[rows, columns].sum()), -int(prefill[rows, columns].sum())),
    )
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
