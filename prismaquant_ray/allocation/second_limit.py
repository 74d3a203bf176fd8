"""A second limit beside bytes: the number of parameters in BF16, for users who need speed.

One of the two limits is priced instead of enforced: with μ nats for every unit above it, min cost + μ·(use − limit)
within the other is a knapsack again, and its optimum is a lower bound of every plan that keeps both (Geoffrion 1974,
"Lagrangean relaxation for integer programming"). μ is found by the secant between the best plan known on either side
of the limit, which ends at the μ with the highest bound. Each limit is priced in turn, because the tighter one should
be enforced exactly. The remaining distance between bound and plan is the plan's gap. It is always reported, and it is
zero where only one of the two binds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prismaquant_ray.allocation.local_search import Resource, improved
from prismaquant_ray.allocation.problem import AllocationProblem, Ints, Plan
from prismaquant_ray.allocation.solver import Solver
from prismaquant_ray.errors import InputError

__all__ = ["LimitedSolver", "SecondLimit", "solver"]

# The secant reaches the highest bound after few steps; this only guards against rounding that never settles.
_STEPS = 60
_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SecondLimit:
    """Use of a second resource by every choice, `use` (groups, formats) int64, and the most a plan may use."""

    use: Ints
    limit: int

    def used(self, problem: AllocationProblem, plan: Plan) -> int:
        """Units that a plan uses."""
        return _taken(self.use, problem.columns(plan.choice))


class LimitedSolver:
    """Plans within bytes and within a second limit, for any number of budgets.

    The second resource must be taken by no format but the largest of each group, as BF16 is, so that the smallest plan
    takes least of it.

    Raises:
        InputError: no plan keeps the second limit.
    """

    def __init__(self, problem: AllocationProblem, second: SecondLimit) -> None:
        self.problem, self.second = problem, second
        use = np.where(problem.allowed, second.use, np.iinfo(np.int64).max)
        least = use.min(axis=1, keepdims=True)
        if int(least.sum()) > second.limit:
            raise InputError(f"Every plan takes {least.sum()} of what is limited to {second.limit}; raise the limit.")
        self._solver = Solver(problem)
        # Any of its plans keeps the second limit, and the smallest plan is one of them.
        self._frugal = Solver(problem.with_cost(np.where(use == least, problem.cost, np.nan)))

    def plan(self, budget_bytes: int) -> Plan:
        """The cheapest plan found of at most `budget_bytes`, with a proven bound; see `Solver.plan`."""
        problem, second = self.problem, Resource(self.second.use, self.second.limit)
        plan = self._solver.plan(budget_bytes)
        if self.second.used(problem, plan) <= second.limit:
            return plan
        bytes_ = Resource(problem.size, budget_bytes)
        within = problem.columns(self._frugal.plan(budget_bytes).choice)
        found = [_relaxed(problem, exact, priced, within) for exact, priced in ((bytes_, second), (second, bytes_))]
        best = min((columns for columns, _ in found), key=lambda columns: problem.plan(columns, 0, 0.0).cost)
        columns = improved(best, problem.cost, resources=(bytes_, second))
        bound = max(plan.bound, *(bound for _, bound in found))
        cost = problem.plan(columns, 0, 0.0).cost
        # Less than rounding apart is proven optimal.
        slack = cost - bound if cost - bound > 64 * _EPSILON * abs(cost) else 0.0
        return problem.plan(columns, budget_bytes, slack)


def solver(problem: AllocationProblem, second: SecondLimit | None) -> Solver | LimitedSolver:
    """A solver for any number of budgets, within a second limit if there is one."""
    return Solver(problem) if second is None else LimitedSolver(problem, second)


def _relaxed(problem: AllocationProblem, exact: Resource, priced: Resource, within: Ints) -> tuple[Ints, float]:
    """Price one of two limits: columns of the best plan found within both, and a lower bound on all such plans.

    `within` are columns of any plan within both limits.
    """

    def cost(columns: Ints) -> float:
        return problem.plan(columns, 0, 0.0).cost

    def optimum(price: float) -> tuple[Ints, float]:
        """The optimum at a price per unit of the priced resource, and the bound that it proves."""
        paid = price * priced.limit
        model = AllocationProblem(
            groups=problem.groups,
            formats=problem.formats,
            cost=problem.cost + price * priced.use,
            size=np.where(problem.allowed, exact.use, 0),
        )
        plan = Solver(model).plan(exact.limit)
        # Rounding in the priced costs must not lift the bound.
        return problem.columns(plan.choice), plan.bound - paid - 8 * _EPSILON * (abs(plan.cost) + paid)

    over, bound = optimum(0.0)
    if _taken(priced.use, over) <= priced.limit:
        return over, bound
    best = within
    for _ in range(_STEPS):
        excess, spare = _taken(priced.use, over) - priced.limit, priced.limit - _taken(priced.use, within)
        price = (cost(within) - cost(over)) / (excess + spare)
        if price <= 0.0:
            break
        columns, dual = optimum(price)
        bound = max(bound, dual)
        line, beyond = cost(over) + price * excess, _taken(priced.use, columns) - priced.limit
        if cost(columns) + price * beyond >= line - 1e-12 * abs(line):
            break
        if beyond > 0:
            over = columns
        else:
            within = columns
            best = min(best, columns, key=cost)
    return best, bound


def _taken(use: Ints, columns: Ints) -> int:
    return int(use[np.arange(len(columns)), columns].sum())
