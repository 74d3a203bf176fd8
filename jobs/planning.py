"""Plans from prices: one budget, or every target of the sweep with the knee of the frontier."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from jobs.run import Run
from prismaquant_ray.allocation.frontier import frontier, knee, sweep
from prismaquant_ray.allocation.problem import AllocationProblem, Plan
from prismaquant_ray.allocation.solver import solve
from prismaquant_ray.config import BudgetConfig
from prismaquant_ray.errors import InputError


def problem(run: Run, budget: BudgetConfig) -> AllocationProblem:
    """The knapsack: prices under the configured objective, bytes as this kind of budget counts them."""
    table = run.table
    return AllocationProblem(
        groups=table.groups,
        formats=tuple(str(name) for name in table.formats),
        cost=table.cost(run.config.allocation.objective),
        size=run.sizes.of(budget),
    )


def allocate(run: Run) -> dict[str, Any]:
    """The plan for the configured budget, also stored under plans/."""
    budget = run.config.budget
    limit = run.sizes.limit(budget)
    plan = described(run, budget, solve(problem(run, budget), limit))
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
    plans = sweep(model, [limit for _, limit in budgets])
    result = {
        "targets": [described(run, budget, plan) for (budget, _), plan in zip(budgets, plans, strict=True)],
        "out_of_reach": outside,
        "knee": _knee(run, model, budgets[0][1], budgets[-1][1]),
    }
    run.store.put("plans/sweep.json", json.dumps(result, indent=1).encode())
    return result


def _knee(run: Run, model: AllocationProblem, low: int, high: int) -> dict[str, float] | None:
    """Kneedle on the frontier's breakpoints between the first and the last target; None when there are too few."""
    curve = frontier(model)
    inside = np.flatnonzero((curve.bytes >= low) & (curve.bytes <= high))
    # The breakpoint just below the first target belongs to the range: it is what that budget buys.
    first = int(np.searchsorted(curve.bytes, low, side="right")) - 1
    points = np.union1d(inside, [first]) if first >= 0 else inside
    if len(points) < 3:
        return None
    index = points[knee(curve.bytes[points], curve.cost[points])]
    return {
        "bpp": run.sizes.bpp(int(curve.bytes[index])),
        "predicted_loss": float(curve.cost[index]),
        "from_bpp": run.sizes.bpp(int(curve.bytes[points[0]])),
        "to_bpp": run.sizes.bpp(int(curve.bytes[points[-1]])),
    }
