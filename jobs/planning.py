"""Plans from prices: one budget, or every target of the sweep with the knee of the frontier."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.calibration import read_calibration
from actors.memory import free_memory
from actors.schedule.units import Stage
from jobs.run import Run
from prismaquant_ray.allocation.frontier import frontier, knee, sweep
from prismaquant_ray.allocation.interactions import Interactions, Refinement, bytes_needed, refine
from prismaquant_ray.allocation.problem import AllocationProblem, Floats, Ints, Plan
from prismaquant_ray.allocation.second_limit import solver
from prismaquant_ray.calibration.batches import TOKENS
from prismaquant_ray.config import BudgetConfig
from prismaquant_ray.errors import InputError, ResourceError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Block, BlockKind
from prismaquant_ray.storage.record import read_tensors

# Their p vectors have an entry for every token of every sequence; other blocks have patches, or a loss of their own.
_ALIGNED = (BlockKind.DECODER, BlockKind.HEAD)
# Budgets between the first and the last target at which a frontier without breakpoints is taken.
_CURVE = 65


def problem(run: Run, budget: BudgetConfig) -> AllocationProblem:
    """The knapsack: prices under the configured objective, bytes as this kind of budget counts them."""
    table = run.table
    return AllocationProblem(
        groups=table.groups,
        formats=tuple(str(name) for name in table.formats),
        cost=np.where(run.sizes.allowed, table.cost(run.config.allocation.objective), np.nan),
        size=run.sizes.of(budget),
    )


def allocate(run: Run) -> dict[str, Any]:
    """The plan for the configured budget, also stored under plans/."""
    budget = run.config.budget
    limit = run.sizes.limit(budget)
    model = problem(run, budget)
    chosen = solver(model, run.sizes.second).plan(limit)
    if run.config.allocation.interactions:
        plan = refined(run, budget, model, chosen, interactions(run))
    else:
        plan = described(run, budget, chosen)
    run.store.put(f"plans/{budget.target}.json", json.dumps(plan, indent=1).encode())
    return plan


def refined(
    run: Run, budget: BudgetConfig, model: AllocationProblem, plan: Plan, found: Interactions
) -> dict[str, Any]:
    """An additive plan refined with interactions, with what that gained under `refinement`."""
    second = run.sizes.second
    result: Refinement = refine(
        model, plan, found, lambda cost: solver(model.with_cost(cost), second).plan(plan.budget), second
    )
    gained = {key: value for key, value in asdict(result).items() if key != "plan"}
    return described(run, budget, result.plan, found) | {"refinement": gained}


def interactions(run: Run) -> Interactions:
    """What the errors of groups have to do with each other, from the p vectors of every block.

    `quadratic` of what is returned prices any choice of formats. Raises ResourceError when the vectors do not fit into
    this machine's memory.
    """
    calibration = read_calibration(run.store)
    lengths = [calibration.tokens.shape[1]] * calibration.texts
    lengths += [image[TOKENS].numel() for image in calibration.images]
    table, blocks = run.table, run.layout.of(*_ALIGNED)
    coded = [name for name in table.formats if FORMATS[name].codec is not None]
    count = len(coded) * sum(len(block.groups) for block in blocks)
    needed, free = bytes_needed(count, sum(lengths), table.token_fisher.size), free_memory()
    if needed > free:
        raise ResourceError(
            f"interactions of {count} candidates over {sum(lengths)} tokens take {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; run this on a larger machine, or without allocation.interactions"
        )
    aligned = {group.name for block in blocks for group in block.groups}
    return Interactions.of(
        table.groups,
        [str(name) for name in table.formats],
        table.token_fisher,
        (entry for block in blocks for entry in _vectors(run, block, coded)),
        lengths=lengths,
        apart=set(table.groups) - aligned,
    )


def _vectors(run: Run, block: Block, formats: list[FormatName]) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
    """The p vectors of a block, by group and format."""
    tensors = read_tensors(run.store, run.records[Stage.BACKWARD][block.index].artifacts["vectors"])
    for group in block.groups:
        for name in formats:
            p = tensors.get(f"{group.name}|{name}")
            if p is not None:
                yield group.name, str(name), p.numpy()


def described(run: Run, budget: BudgetConfig, plan: Plan, found: Interactions | None = None) -> dict[str, Any]:
    """A plan as people and programs read it; with interactions also its price with them."""
    sizes = run.sizes
    columns = {str(name): column for column, name in enumerate(sizes.formats)}
    chosen = [columns[plan.choice[group.name]] for group in run.layout.groups]
    rows = range(len(chosen))
    weights, stored = int(sizes.weights[rows, chosen].sum()), int(sizes.stored[rows, chosen].sum())
    errors = run.table.standard_error[rows, chosen]
    counts = Counter(plan.choice.values())
    kept_in_bf16 = sum(group.parameters for group in run.layout.groups if plan.choice[group.name] == FormatName.BF16)
    with_interactions = (
        {}
        if found is None
        else {
            "predicted_with_interactions": found.quadratic(plan.choice),
            "standard_error_with_interactions": found.standard_error(plan.choice),
        }
    )
    return {
        "target": budget.target,
        "objective": run.config.allocation.objective,
        "predicted_loss": plan.cost,
        "standard_error": float(np.sqrt(np.square(errors).sum())),
        "bound": plan.bound,
        "gap": plan.gap,
        **with_interactions,
        "bpp": sizes.bpp(weights),
        "weight_bytes": weights,
        "repository_bytes_at_most": stored + sizes.fixed,
        "loaded_bytes": sizes.loaded(stored),
        "vram": None if sizes.serving is None else sizes.serving.described(sizes.loaded(stored)),
        "bf16_fraction": kept_in_bf16 / sizes.parameters,
        "groups": {str(name): counts.get(str(name), 0) for name in sizes.formats},
        "choice": dict(plan.choice),
    }


def sweep_targets(run: Run) -> dict[str, Any]:
    """A plan for every target that a plan exists for, the others listed, and the knee of the whole frontier.

    With `allocation.interactions` also every plan refined, under `refined`.
    """
    budgets, outside = [], []
    for target in sorted(set(run.config.sweep)):
        budget = BudgetConfig(bpp=target)
        try:
            budgets.append((budget, run.sizes.limit(budget)))
        except InputError:
            outside.append(target)
    if not budgets:
        # Every target is out of reach: the error of the first one gives the bounds.
        run.sizes.limit(BudgetConfig(bpp=run.config.sweep[0]))
    model = problem(run, budgets[0][0])
    plans = sweep(model, [limit for _, limit in budgets], run.sizes.second)
    found = interactions(run) if run.config.allocation.interactions else None
    pairs = [(budget, plan) for (budget, _), plan in zip(budgets, plans, strict=True)]
    result = {
        "targets": [described(run, budget, plan, found) for budget, plan in pairs],
        "out_of_reach": outside,
        "knee": _knee(run, model, budgets[0][1], budgets[-1][1]),
    }
    if found is not None:
        result["refined"] = [refined(run, budget, model, plan, found) for budget, plan in pairs]
    run.store.put("plans/sweep.json", json.dumps(result, indent=1).encode())
    return result


def _knee(run: Run, model: AllocationProblem, low: int, high: int) -> dict[str, float] | None:
    """Kneedle on the frontier's breakpoints between the first and the last target; None when there are too few."""
    sizes, costs = _curve(run, model, low, high)
    if len(sizes) < 3:
        return None
    index = knee(sizes, costs)
    return {
        "bpp": run.sizes.bpp(int(sizes[index])),
        "predicted_loss": float(costs[index]),
        "from_bpp": run.sizes.bpp(int(sizes[0])),
        "to_bpp": run.sizes.bpp(int(sizes[-1])),
    }


def _curve(run: Run, model: AllocationProblem, low: int, high: int) -> tuple[Ints, Floats]:
    """Bytes and cost along the frontier between two budgets."""
    if run.sizes.second is not None:
        # Its frontier has no breakpoints to be read off; plans for evenly spaced budgets are as good.
        plans = sweep(model, np.unique(np.linspace(low, high, _CURVE).astype(np.int64)).tolist(), run.sizes.second)
        return np.array([plan.budget for plan in plans]), np.array([plan.cost for plan in plans])
    curve = frontier(model)
    inside = np.flatnonzero((curve.bytes >= low) & (curve.bytes <= high))
    # The breakpoint just below the first target belongs to the range: it is what that budget buys.
    first = int(np.searchsorted(curve.bytes, low, side="right")) - 1
    points = np.union1d(inside, [first]) if first >= 0 else inside
    return curve.bytes[points], curve.cost[points]
