"""Plans from prices: one budget, or every target of the sweep with the knee of the frontier."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from jobs.run import Run
from prismaquant_ray.allocation.frontier import frontier, knee, sweep
from prismaquant_ray.allocation.problem import AllocationProblem, Floats, Ints, Plan
from prismaquant_ray.allocation.second_limit import solver
from prismaquant_ray.config import BudgetConfig
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FormatName

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
    plan = described(run, budget, solver(problem(run, budget), run.sizes.second).plan(limit))
    run.store.put(f"plans/{budget.target}.json", json.dumps(plan, indent=1).encode())
    return plan


def described(run: Run, budget: BudgetConfig, plan: Plan) -> dict[str, Any]:
    """A plan as people and programs read it."""
    sizes = run.sizes
    columns = {str(name): column for column, name in enumerate(sizes.formats)}
    chosen = [columns[plan.choice[group.name]] for group in run.layout.groups]
    rows = range(len(chosen))
    weights, stored = int(sizes.weights[rows, chosen].sum()), int(sizes.stored[rows, chosen].sum())
    errors = run.table.standard_error[rows, chosen]
    counts = Counter(plan.choice.values())
    kept_in_bf16 = sum(group.parameters for group in run.layout.groups if plan.choice[group.name] == FormatName.BF16)
    return {
        "target": budget.target,
        "objective": run.config.allocation.objective,
        "predicted_loss": plan.cost,
        "standard_error": float(np.sqrt(np.square(errors).sum())),
        "bound": plan.bound,
        "gap": plan.gap,
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
    """A plan for every target that a plan exists for, the others listed, and the knee of the whole frontier."""
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
    result = {
        "targets": [described(run, budget, plan) for (budget, _), plan in zip(budgets, plans, strict=True)],
        "out_of_reach": outside,
        "knee": _knee(run, model, budgets[0][1], budgets[-1][1]),
    }
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
