"""Plans within a budget of bytes and within limits on other resources, e.g. the time of a prompt's token.

All limits are priced at once: the dual's prices give a lower bound of every plan (`dual`), a search over partial plans
then closes what is left between the bound and the best plan (`limited_search`). Where the search ends before that, the
plan carries the remaining distance as its gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prismaquant_ray.allocation.dual import Dual
from prismaquant_ray.allocation.limited_search import LimitedSearch
from prismaquant_ray.allocation.limits import Limit, least_use, within
from prismaquant_ray.allocation.local_search import improved
from prismaquant_ray.allocation.problem import AllocationProblem, Ints, Plan
from prismaquant_ray.allocation.solver import Solver
from prismaquant_ray.errors import InputError

__all__ = ["LimitedSolver", "solver"]

# A narrow first run finds a good plan; the second one then has far less to prove.
_SCOUT_WIDTH = 512
# The local search looks at all pairs of choices.
_MOST_PAIRS = 1500
# What rounding may do to a bound, as a share of the largest costs: prices of large limits round more than costs do.
_ROUNDING = 1e-12


class LimitedSolver:
    """Plans within bytes and within limits, for any number of budgets.

    Args:
        problem: costs and sizes.
        limits: at least one.
        state_limit: partial plans that one search may look into, a twentieth of them at a time; 0 for the bound and a
            plan near it, without a search.
    """

    def __init__(self, problem: AllocationProblem, limits: Sequence[Limit], *, state_limit: int = 100_000) -> None:
        self.problem, self._solver, self._state_limit = problem, Solver(problem), state_limit
        self._rounding = _ROUNDING * float(np.nanmax(np.abs(problem.cost), axis=1).sum())
        # What is used as bytes are is another budget.
        alike = [np.array_equal(limit.use[problem.allowed], problem.size[problem.allowed]) for limit in limits]
        self._budgets = [limit for limit, same in zip(limits, alike, strict=True) if same]
        self._limits = [limit for limit, same in zip(limits, alike, strict=True) if not same]

    def plan(self, budget_bytes: int) -> Plan:
        """The cheapest plan of at most `budget_bytes` within the limits; see `Solver.plan`.

        Raises:
            InputError: no plan is that small, or none within the budget keeps a limit; the message says which limit
                could be kept.
        """
        problem = self.problem
        usable = self._usable(budget_bytes)
        free = self._solver.plan(usable)
        if all(limit.kept(problem, free) for limit in self._limits):
            return replace(free, budget=budget_bytes)
        limits = [Limit(name="budget", use=problem.size, limit=usable), *self._limits]
        dual = Dual(problem, limits, self._kept(usable))
        search = LimitedSearch(problem, limits, dual)
        widths = (_SCOUT_WIDTH, max(_SCOUT_WIDTH, self._state_limit // 20))
        for width in widths if self._state_limit else ():
            if not search.proven:
                search.run(width, self._state_limit)
        columns = min(search.columns, dual.columns, key=lambda found: problem.plan(found, 0, 0.0).cost)
        bound = max(free.bound, dual.bound + min(search.floor, search.excess))
        if not search.proven and self._state_limit and problem.cost.size <= _MOST_PAIRS:
            columns = improved(columns, problem.cost, limits=limits)
        cost = problem.plan(columns, 0, 0.0).cost
        # Less than rounding apart is proven optimal.
        slack = search.worth if search.proven else cost - bound
        slack = slack if slack > self._rounding else 0.0
        return problem.plan(columns, budget_bytes, slack)

    def check(self, budget_bytes: int) -> None:
        """Raise InputError unless a plan of at most `budget_bytes` keeps the limits."""
        self._kept(self._usable(budget_bytes))

    def _usable(self, budget_bytes: int) -> int:
        smallest = int(self._solver.relaxation.bytes[0])
        for limit in self._budgets:
            if limit.limit < smallest:
                raise limit.refusal(smallest)
        return min([budget_bytes, *(limit.limit for limit in self._budgets)])

    def _kept(self, budget_bytes: int) -> Ints:
        """Columns (groups,) of a plan within budget and limits: one that uses least of a limit."""
        problem, columns = self.problem, np.zeros(0, dtype=np.int64)
        limits = [Limit(name="budget", use=problem.size, limit=budget_bytes), *self._limits]
        for limit in self._limits:
            columns = least_use(problem, limit)
            if within(columns, limits):
                return columns
        for place, limit in enumerate(self._limits):
            # Alone first, so that the message is of one limit where one suffices to refuse.
            for others in [()] if place == 0 else [(), self._limits[:place]]:
                use = np.where(problem.allowed, limit.use / max(1, limit.unit), np.nan)
                least = solver(problem.with_cost(use), others).plan(budget_bytes)
                columns = problem.columns(least.choice)
                if limit.used(columns) > limit.limit:
                    raise limit.refusal(limit.used(columns))
        if not within(columns, self._limits):
            raise InputError("no plan within the budget keeps the limits together; raise one")
        return columns


def solver(problem: AllocationProblem, limits: Sequence[Limit]) -> Solver | LimitedSolver:
    """A solver for any number of budgets, within the limits if there are any."""
    return LimitedSolver(problem, limits) if limits else Solver(problem)
