"""The allocator's plans are the best there are, fit the budget, and say what they know about both."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prismaquant_ray.allocation.frontier import frontier, knee, sweep
from prismaquant_ray.allocation.problem import AllocationProblem, Plan
from prismaquant_ray.allocation.solver import Solver, solve
from prismaquant_ray.errors import InputError
from tests.problems import NAN, inside, largest, make, smallest, transformer
from tests.reference.knapsack import cheapest_cost, every_plan, integer_program


def assert_consistent(problem: AllocationProblem, plan: Plan) -> None:
    chosen = [(i, problem.formats.index(plan.choice[group])) for i, group in enumerate(problem.groups)]
    assert list(plan.choice) == list(problem.groups)
    assert plan.size == sum(int(problem.size[at]) for at in chosen) <= plan.budget
    assert plan.cost == math.fsum(problem.cost[at] for at in chosen)
    assert plan.bound <= plan.cost
    assert plan.gap >= 0


@st.composite
def problems(draw: st.DrawFn) -> AllocationProblem:
    groups, formats = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    shape = (groups, formats)
    sizes = draw(
        st.sampled_from([st.integers(0, 4), st.integers(0, 40).map(lambda n: n * 4096), st.integers(0, 10**9)])
    )
    size = np.array(draw(st.lists(sizes, min_size=groups * formats, max_size=groups * formats))).reshape(shape)
    costs = draw(
        st.sampled_from(
            [
                st.integers(0, 3).map(float),  # ties and zeros
                st.floats(0, 1, width=32),
                st.floats(1e-15, 1e-12),
                st.floats(-1, 1),  # noise below zero
                None,  # cost proportional to size: a subset-sum problem
            ]
        )
    )
    if costs is None:
        cost = 1.0 - 1e-10 * size
    else:
        cost = np.array(draw(st.lists(costs, min_size=groups * formats, max_size=groups * formats))).reshape(shape)
    if draw(st.booleans()):  # identical layers
        cost, size = np.tile(cost[:1], (groups, 1)), np.tile(size[:1], (groups, 1))
    forbidden = np.array(draw(st.lists(st.booleans(), min_size=groups * formats, max_size=groups * formats)))
    forbidden = forbidden.reshape(shape)
    forbidden[:, draw(st.integers(0, formats - 1))] = False
    return make(np.where(forbidden, NAN, cost), size)


@settings(max_examples=300, deadline=None)
@given(problem=problems(), fraction=st.floats(0, 1.1))
def test_a_plan_costs_what_the_best_of_all_plans_costs(problem: AllocationProblem, fraction: float) -> None:
    budget = inside(problem, fraction)
    plan = solve(problem, budget)
    assert_consistent(problem, plan)
    assert plan.cost == pytest.approx(cheapest_cost(problem, budget), rel=1e-13, abs=1e-25)
    assert (plan.bound, plan.gap) == (plan.cost, 0)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), fractions=st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_a_search_cut_short_still_fits_and_its_bound_holds(problem: AllocationProblem, fractions: list[float]) -> None:
    for fraction in fractions:
        plan = Solver(problem, state_limit=1).plan(inside(problem, fraction))
        assert_consistent(problem, plan)
        best = cheapest_cost(problem, plan.budget)
        # Where costs differ by three hundred orders of magnitude the small ones are lost beside the large.
        rounding = 1e-13 * max(abs(best), float(np.nanmax(np.abs(problem.cost))))
        assert plan.bound <= best + rounding
        assert plan.cost >= best - rounding


@settings(max_examples=100, deadline=None)
@given(problem=problems(), tolerance=st.sampled_from([1e-3, 0.1, 1.0]), fraction=st.floats(0, 1))
def test_a_tolerated_gap_is_certified(problem: AllocationProblem, tolerance: float, fraction: float) -> None:
    plan = Solver(problem, gap_tolerance=tolerance).plan(inside(problem, fraction))
    assert_consistent(problem, plan)
    best = cheapest_cost(problem, plan.budget)
    assert plan.bound <= best + 1e-13 * max(1, abs(best))
    assert plan.cost >= best - 1e-13 * max(1, abs(best))
    if not (problem.cost < 0).any():
        assert plan.gap <= tolerance * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), fractions=st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_cost_never_rises_with_the_budget(problem: AllocationProblem, fractions: list[float]) -> None:
    budgets = [inside(problem, fraction) for fraction in fractions]
    plans = sweep(problem, budgets)
    assert [plan.budget for plan in plans] == budgets
    ordered = sorted(plans, key=lambda plan: plan.budget)
    assert all(right.cost <= left.cost for left, right in pairwise(ordered))
    for plan in plans:
        assert_consistent(problem, plan)
        assert plan.cost == pytest.approx(solve(problem, plan.budget).cost, rel=1e-13, abs=1e-25)


@settings(max_examples=200, deadline=None)
@given(problem=problems())
def test_every_breakpoint_is_optimal_for_its_bytes_and_no_plan_lies_below_the_frontier(
    problem: AllocationProblem,
) -> None:
    curve = frontier(problem)
    scale = 1e-12 * max(1e-12, float(np.abs(curve.cost).max()))
    for index in range(len(curve.bytes)):
        plan = curve.plan(index)
        assert_consistent(problem, plan)
        assert plan.size == curve.bytes[index]
        assert plan.cost == pytest.approx(curve.cost[index], rel=1e-12, abs=scale)
        assert plan.cost <= cheapest_cost(problem, plan.size) + scale
    assert (curve.bytes[0], curve.bytes[-1]) == (smallest(problem), problem.largest_bytes)
    for size, cost in every_plan(problem):
        assert cost >= np.interp(size, curve.bytes, curve.cost) - scale


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_falls_and_flattens(seed: int) -> None:
    curve = frontier(transformer(50, seed, formats=8))
    assert len(curve.bytes) > 300
    assert (np.diff(curve.bytes) > 0).all()
    slope = np.diff(curve.cost) / np.diff(curve.bytes)
    assert (slope < 0).all()
    assert (np.diff(slope) >= -1e-6 * np.abs(slope[1:])).all()


def test_a_frontier_plan_is_found_from_either_end_and_not_beyond() -> None:
    curve = frontier(transformer(2, 0))
    assert curve.plan(-1) == curve.plan(len(curve.bytes) - 1)
    with pytest.raises(IndexError):
        curve.plan(len(curve.bytes))


def random_problem(seed: int) -> AllocationProblem:
    random = np.random.default_rng(seed)
    size = random.integers(10**5, 10**8, (200, 4))
    return make(1e-3 * random.random((200, 4)) / size * size.mean(), size)


@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.6])
@pytest.mark.parametrize(
    "problem", [random_problem(0), random_problem(1), transformer(50, 2), transformer(50, 3)], ids="ab12"
)
def test_an_integer_program_finds_nothing_better(problem: AllocationProblem, fraction: float) -> None:
    budget = int(smallest(problem) + fraction * (problem.largest_bytes - smallest(problem)))
    plan = solve(problem, budget)
    assert_consistent(problem, plan)
    assert plan.gap == 0
    assert plan.cost == pytest.approx(integer_program(problem, budget), rel=1e-9)


def test_a_large_model_is_solved_exactly() -> None:
    problem = transformer(250, 5, formats=8)
    for plan in sweep(problem, [inside(problem, fraction) for fraction in (0.05, 0.2, 0.4)]):
        assert_consistent(problem, plan)
        assert plan.gap == 0


def proportional(groups: int = 400) -> AllocationProblem:
    """Every plan of a size costs the same, and sizes share no factor: nothing can be ruled out."""
    random = np.random.default_rng(0)
    size = np.sort(random.integers(10**6, 10**8, (groups, 4)), axis=1)
    return make(1 - 1e-10 * size, size)


def test_a_hopeless_instance_ends_with_an_honest_gap() -> None:
    problem = proportional()
    plan = Solver(problem, state_limit=100_000).plan(inside(problem, 0.5))
    assert_consistent(problem, plan)
    assert 0 < plan.gap < 1e-6
    assert plan.gap == pytest.approx((plan.cost - plan.bound) / plan.cost, rel=1e-2)


def test_a_tolerance_ends_the_search_within_it() -> None:
    problem = proportional()
    plan = Solver(problem, gap_tolerance=1e-6).plan(inside(problem, 0.5))
    assert 0 < plan.gap <= 1e-6


def test_the_same_problem_has_the_same_plan() -> None:
    problem = transformer(30, 1)
    budget = inside(problem, 0.3)
    assert solve(problem, budget) == solve(transformer(30, 1), budget)


def test_of_equal_formats_the_smaller_wins_then_the_first() -> None:
    problem = make([[1.0, 1.0, 1.0], [2.0, 2.0, NAN]], [[9, 5, 5], [3, 4, 1]])
    assert solve(problem, 100).choice == {"layers.0": "F1", "layers.1": "F0"}


def test_a_larger_format_that_costs_more_is_never_chosen() -> None:
    problem = make([[3.0, 1.0, 2.0]], [[1, 2, 3]])
    assert solve(problem, 3).choice == {"layers.0": "F1"}
    assert (smallest(problem), problem.largest_bytes, largest(problem)) == (1, 2, 3)


def test_the_last_byte_decides() -> None:
    problem = make([[1.0, 0.0], [1.0, 0.25]], [[10, 21], [10, 20]])
    assert [plan.cost for plan in sweep(problem, [29, 30, 31, 40, 41])] == [2.0, 1.25, 1.0, 1.0, 0.25]


def test_a_budget_too_small_names_both_bounds() -> None:
    problem = transformer(2, 0)
    with pytest.raises(InputError) as error:
        solve(problem, smallest(problem) - 1)
    assert {str(smallest(problem) - 1), str(smallest(problem)), str(problem.largest_bytes)} <= set(
        re.findall(r"\d+", str(error.value))
    )
    assert "\n" not in str(error.value)
    assert solve(problem, smallest(problem)).size == smallest(problem)


def test_a_budget_above_everything_gives_the_cheapest_plan() -> None:
    problem = transformer(2, 0)
    plan = solve(problem, 10**15)
    assert plan.size == problem.largest_bytes
    assert (plan.cost, plan.gap) == (pytest.approx(np.nanmin(problem.cost, axis=1).sum()), 0)


@pytest.mark.parametrize(
    ("cost", "size", "message"),
    [
        ([[1.0, math.inf]], [[1, 2]], "layers.0 has an infinite cost in F1"),
        ([[1.0, 1.0], [1.0, 1.0]], [[1, 2], [-1, 2]], "layers.1 has a negative size in F0"),
        ([[1.0, 1.0], [NAN, NAN]], [[1, 2], [1, 2]], "layers.1 has no format"),
        ([[1.0, 1.0]], [[1, 2, 3]], "shape"),
        ([[1.0, 1.0]], [[1.5, 2.0]], "dtype"),
        ([[1.0, 1.0]], [[2**62, 1]], "2\\^62"),
    ],
)
def test_a_bad_table_is_refused_by_name(cost: object, size: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(cost, size)


def test_names_are_unique_and_there_is_something_to_allocate() -> None:
    one, two = np.ones((1, 2)), np.ones((2, 1))
    with pytest.raises(InputError, match="format A is listed twice"):
        AllocationProblem(groups=("g",), formats=("A", "A"), cost=one, size=one.astype(int))
    with pytest.raises(InputError, match="group g is listed twice"):
        AllocationProblem(groups=("g", "g"), formats=("A",), cost=two, size=two.astype(int))
    with pytest.raises(InputError, match="0 groups"):
        AllocationProblem(groups=(), formats=("A",), cost=np.ones((0, 1)), size=np.ones((0, 1), dtype=int))


def test_the_size_of_a_forbidden_format_is_ignored() -> None:
    problem = make([[1.0, NAN]], [[7, -5]])
    assert (smallest(problem), largest(problem)) == (7, 7)


def test_a_problem_keeps_its_own_read_only_tables() -> None:
    cost = np.ones((1, 2))
    problem = AllocationProblem(groups=("g",), formats=("A", "B"), cost=cost, size=np.array([[1, 2]]))
    cost[0, 0] = 9
    assert problem.cost[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        problem.cost[0, 0] = 5


def test_the_knee_of_a_hyperbola_is_where_its_slope_is_the_chords() -> None:
    x = np.linspace(1, 9, 801)
    # 1/x has the slope of its chord, −1/9, at x = 3.
    assert x[knee(x, 1 / x)] == pytest.approx(3)
    assert x[knee(x, 1e-9 / x + 7)] == pytest.approx(3)


def test_the_knee_depends_on_the_range() -> None:
    x = np.linspace(1, 9, 801)
    part = x <= 4
    assert x[part][knee(x[part], 1 / x[part])] == pytest.approx(2)


@pytest.mark.parametrize("y", [np.zeros(50), np.full(50, 0.1), np.linspace(3, 1, 50)], ids=["zero", "flat", "straight"])
def test_a_curve_without_a_knee_gives_its_first_point(y: NDArray[np.float64]) -> None:
    assert knee(np.linspace(0.1, 0.7, 50), y) == 0


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [2, 1]), ([1, 2, 3], [1, 2]), ([1, 1, 2], [3, 2, 1]), ([1, 2, 3], [1, NAN, 0])]
)
def test_a_curve_that_is_none_has_no_knee(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match=r"knee|curve"):
        knee(x, y)


def test_the_allocator_imports_neither_torch_nor_scipy() -> None:
    check = "import prismaquant_ray.allocation.frontier, sys; assert not {'torch', 'scipy', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
