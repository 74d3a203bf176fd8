"""Plans from prices: one budget, or every target of a sweep with the knee of the frontier."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.allocation.constraints import check_limits
from prismaquant_ray.allocation.frontier import frontier, knee, sweep
from prismaquant_ray.allocation.kv_cache import cache_stays
from prismaquant_ray.allocation.limited_solver import LimitedSolver, solver
from prismaquant_ray.allocation.limits import Limit
from prismaquant_ray.allocation.problem import AllocationProblem, Floats, Ints, Plan
from prismaquant_ray.allocation.solver import Solver, solve
from prismaquant_ray.allocation.speed import Times
from prismaquant_ray.backward.cost_table import CacheCost, CostTable
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.records import CacheType, Knee, PlanRecord, SweepRecord
from prismaquant_ray.settings.budget import BudgetConfig

#: The format of every fused group, by its name.
Choice = Mapping[str, FormatName]
_FREE = CacheCost(cost=0.0, standard_error=0.0, body=0.0, body_standard_error=0.0)
_TINY = math.ulp(0.0)
# Budgets between the first and the last target at which a frontier without breakpoints is taken.
_CURVE = 65


@dataclass(frozen=True, kw_only=True, eq=False)
class Planner:
    """The plans of one measured run. The sweep is solved on first use and cached.

    `sizes` are with a KV cache in 16 bits. The type of the cache is one for the whole model, so a choice between two is
    made by solving for both.
    """

    config: Config
    layout: Layout
    sizes: Sizes
    table: CostTable

    @cached_property
    def times(self) -> Times:
        """Time of every candidate on the configured card."""
        return Times.of(self.layout, self.sizes.formats, self.sizes.weights, self.config.allocation.limits.gpu)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The configured limits on time."""
        return self.times.limits(self.config.allocation.limits)

    def problem(self, budget: BudgetConfig) -> AllocationProblem:
        """The knapsack: prices under the configured objective, bytes as this kind of budget counts them."""
        return AllocationProblem(
            groups=self.table.groups,
            formats=tuple(str(name) for name in self.table.formats),
            cost=np.where(self.sizes.allowed, self.table.cost(self.config.allocation.objective), np.nan),
            size=self.sizes.of(budget),
        )

    @cached_property
    def plan(self) -> PlanRecord:
        """The plan for the configured budget.

        Raises:
            InputError: no plan has that many bytes, or none of them keeps the limits.
        """
        return self.plan_for(self.config.budget)

    def plan_for(self, budget: BudgetConfig) -> PlanRecord:
        """The cheapest plan within a budget and the limits.

        Raises:
            InputError: no plan has that many bytes, or none of them keeps the limits.
        """
        if self.config.kv_cache != "auto" or budget.vram is None:
            return self._plan_with(budget, self.fixed_cache)
        plans: list[PlanRecord] = []
        problem: InputError | None = None
        caches: tuple[CacheType, ...] = ("bf16", "fp8")
        for kind in caches:
            try:
                plans.append(self._plan_with(budget, kind))
            except InputError as error:
                problem = error
        if not plans:
            assert problem is not None
            raise problem  # that of FP8, which needs least
        best = min(plans, key=lambda plan: plan.predicted_loss)
        bound = min(plan.bound for plan in plans)
        return replace(best, bound=bound, gap=(best.predicted_loss - bound) / max(abs(best.predicted_loss), _TINY))

    @property
    def fixed_cache(self) -> CacheType:
        """The type of the KV cache where there is no choice; `auto` is one for `vram` budgets only."""
        return "fp8" if self.config.kv_cache == "fp8" else "bf16"

    def cache_cost(self, kind: CacheType) -> CacheCost:
        """What a type of KV cache costs.

        Raises:
            InputError: the run has no price of it.
        """
        if kind == "bf16":
            return _FREE
        if self.layout.kept_cache is not None:
            raise cache_stays(self.layout, self.layout.kept_cache)
        if self.table.cache is None:
            raise InputError("kv_cache: fp8 has no price in this run; start it over with --fresh")
        return self.table.cache

    def sizes_with(self, kind: CacheType) -> Sizes:
        """Sizes with a type of KV cache."""
        return self.sizes.in_fp8() if kind == "fp8" else self.sizes

    def _plan_with(self, budget: BudgetConfig, kind: CacheType) -> PlanRecord:
        limit = self.sizes_with(kind).limit(budget)
        return self._record(budget.target, self._solver(self.problem(budget)).plan(limit), kind)

    def plan_of(self, choice: Choice, target: str, *, kv_cache: CacheType | None = None) -> PlanRecord:
        """The plan that is a choice of one's own; `bound` is that of all plans of at most as many bytes.

        `kv_cache` is the type of its KV cache, by default the configured one.

        Raises:
            InputError: a group has no format, or one that it cannot take.
        """
        problem = self.problem(BudgetConfig(bpp=1.0))
        for group, allowed in zip(problem.groups, problem.allowed, strict=True):
            can_take = [name for name, can in zip(problem.formats, allowed, strict=True) if can]
            if choice.get(group) not in can_take:
                raise InputError(f"{group} cannot be {choice.get(group)}; it can be {', '.join(can_take)}")
        columns = problem.columns(choice)
        rows = np.arange(len(columns))
        size, cost = int(problem.size[rows, columns].sum()), math.fsum(problem.cost[rows, columns].tolist())
        plan = problem.plan(columns, size, slack=cost - solve(problem, size).bound)
        return self._record(target, plan, self.fixed_cache if kv_cache is None else kv_cache)

    @cached_property
    def sweep(self) -> SweepRecord:
        """A plan for every target within reach, the targets that are not, and the knee of the frontier.

        Raises:
            InputError: no target is within reach of the formats.
        """
        kind = self.fixed_cache
        sizes, extra = self.sizes_with(kind), self.cache_cost(kind).cost
        budgets, outside = [], []
        for target in sorted(set(self.config.sweep)):
            budget = BudgetConfig(bpp=target)
            try:
                limit = sizes.limit(budget)
                check_limits(sizes, self.times, budget, self.config.allocation.limits)
                budgets.append((budget, limit))
            except InputError:
                outside.append(target)
        if not budgets:
            # The error of the first target has the bounds.
            first = BudgetConfig(bpp=self.config.sweep[0])
            sizes.limit(first)
            check_limits(sizes, self.times, first, self.config.allocation.limits)
        problem = self.problem(budgets[0][0])
        plans = sweep(problem, [limit for _, limit in budgets], self.limits)
        return SweepRecord(
            targets=[self._record(budget.target, plan, kind) for (budget, _), plan in zip(budgets, plans, strict=True)],
            out_of_reach=outside,
            knee=self._knee(problem, budgets[0][1], budgets[-1][1], extra),
        )

    def curve(self) -> tuple[Ints, Floats]:
        """Bytes of codes and scales, and cost, at every breakpoint of the frontier; under limits at some points."""
        problem, extra = self.problem(BudgetConfig(bpp=1.0)), self.cache_cost(self.fixed_cache).cost
        found = frontier(problem)
        if self.limits:
            sizes, costs = self._limited_curve(problem, int(found.bytes[0]), problem.largest_bytes)
            return sizes, costs + extra
        return found.bytes, found.cost + extra

    def _solver(self, problem: AllocationProblem) -> Solver | LimitedSolver:
        return solver(problem, self.limits)

    def _record(self, target: str, plan: Plan, kind: CacheType) -> PlanRecord:
        sizes, cache = self.sizes_with(kind), self.cache_cost(kind)
        choice = {group: FormatName(name) for group, name in plan.choice.items()}
        columns = columns_of(choice, self.layout, sizes.formats)
        rows = np.arange(len(columns))
        weights, stored = int(sizes.weights[rows, columns].sum()), int(sizes.stored[rows, columns].sum())
        errors = self.table.standard_error[rows, columns]
        return PlanRecord(
            target=target,
            objective=self.config.allocation.objective,
            predicted_loss=plan.cost + cache.cost,
            standard_error=float(np.sqrt(np.square(errors).sum() + cache.standard_error**2)),
            bound=plan.bound + cache.cost,
            # Without a rounded cache to the last bit what the solver says.
            gap=plan.gap if kind == "bf16" else (plan.cost - plan.bound) / max(abs(plan.cost + cache.cost), _TINY),
            bpp=sizes.bpp(weights),
            weight_bytes=weights,
            repository_bytes_at_most=stored + sizes.fixed,
            loaded_bytes=sizes.loaded(stored),
            vram=None if sizes.serving is None else sizes.serving.memory(sizes.loaded(stored)),
            times=self.times.of_plan(columns, self.config.allocation.limits),
            groups=count_groups(choice, sizes.formats),
            kv_cache=kind,
            kv_cache_loss=cache.cost,
            kv_cache_error=cache.standard_error,
            choice=choice,
        )

    def _knee(self, problem: AllocationProblem, low: int, high: int, extra: float) -> Knee | None:
        """Kneedle on the frontier between the first and the last target; None for fewer than three points."""
        sizes, costs = self._curve_between(problem, low, high)
        if len(sizes) < 3:
            return None
        index = knee(sizes, costs)
        return Knee(
            bpp=self.sizes.bpp(int(sizes[index])),
            # A breakpoint is a plan; a point of the relaxation under limits is not.
            predicted_loss=extra
            + (self._solver(problem).plan(int(sizes[index])).cost if self.limits else float(costs[index])),
            from_bpp=self.sizes.bpp(int(sizes[0])),
            to_bpp=self.sizes.bpp(int(sizes[-1])),
        )

    def _curve_between(self, problem: AllocationProblem, low: int, high: int) -> tuple[Ints, Floats]:
        """Bytes and cost along the frontier between two budgets."""
        if self.limits:
            return self._limited_curve(problem, low, high)
        curve = frontier(problem)
        inside = np.flatnonzero((curve.bytes >= low) & (curve.bytes <= high))
        # The breakpoint just below the first target belongs to the range: it is the plan for this budget.
        first = int(np.searchsorted(curve.bytes, low, side="right")) - 1
        points = np.union1d(inside, [first]) if first >= 0 else inside
        return curve.bytes[points], curve.cost[points]

    def _limited_curve(self, problem: AllocationProblem, low: int, high: int) -> tuple[Ints, Floats]:
        """Under limits the frontier has no breakpoints; its linear relaxation at evenly spaced budgets is as good."""
        relaxed = LimitedSolver(problem, self.limits, state_limit=0)
        found = []
        for budget in np.unique(np.linspace(low, high, _CURVE).astype(np.int64)).tolist():
            try:
                found.append((budget, relaxed.plan(budget).bound))
            except InputError:
                continue  # below the smallest plan within the limits
        return np.array([budget for budget, _ in found], dtype=np.int64), np.array([bound for _, bound in found])


def columns_of(choice: Choice, layout: Layout, formats: tuple[FormatName, ...]) -> NDArray[np.int64]:
    """The column of every group's format (groups,), in the layout's order."""
    column_of = {name: column for column, name in enumerate(formats)}
    return np.array([column_of[choice[group.name]] for group in layout.groups], dtype=np.int64)


def count_groups(choice: Choice, formats: tuple[FormatName, ...]) -> dict[FormatName, int]:
    """Number of groups by format; 0 for unused formats."""
    counts = Counter(choice.values())
    return {name: counts.get(name, 0) for name in formats}
