"""Claims about limits on time: plans keep them, none that keeps them is better, and times are hand arithmetic."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.commands import sweep as sweep_command
from jobs.pipeline.inspection import inspect
from jobs.pipeline.run import Run
from prismaquant_ray.allocation.baselines import baselines, vendor_mixture
from prismaquant_ray.allocation.budget import measure
from prismaquant_ray.allocation.dual import Dual
from prismaquant_ray.allocation.frontier import sweep
from prismaquant_ray.allocation.limited_solver import LimitedSolver
from prismaquant_ray.allocation.limits import Limit, within
from prismaquant_ray.allocation.local_search import improved
from prismaquant_ray.allocation.problem import AllocationProblem
from prismaquant_ray.allocation.speed import Times
from prismaquant_ray.allocation.surface import surface
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.events import Event, Notice
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.gpus import GPUS, GpuName
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.report.page import page
from prismaquant_ray.report.plots import plots
from prismaquant_ray.settings.allocation import AllocationConfig, LimitsConfig
from prismaquant_ray.settings.budget import BudgetConfig
from tests.inprocess import in_process, unopened
from tests.problems import NAN, inside, make
from tests.reference.knapsack import cheapest_within
from tests.runs import configuration
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]

# The solver ---------------------------------------------------------------------------------------------------------


@st.composite
def limited(draw: st.DrawFn) -> tuple[AllocationProblem, list[Limit], int]:
    """Small problems with one or two limits beside the budget, ties and formats that a group cannot take included."""
    groups, formats = draw(st.integers(1, 5)), draw(st.integers(2, 4))

    def table(values: st.SearchStrategy[Any]) -> Any:
        return np.array([[draw(values) for _ in range(formats)] for _ in range(groups)])

    costs = draw(st.sampled_from([st.integers(0, 3).map(float), st.floats(0, 1, width=32), st.floats(-0.1, 1)]))
    cost = table(costs)
    cost[:, 1:] = np.where(table(st.integers(0, 9))[:, 1:] == 0, NAN, cost[:, 1:])
    problem = make(cost, table(st.sampled_from([4, 4, 8, 9, 16])) * draw(st.integers(1, 10)))
    limits = []
    for number in range(draw(st.integers(1, 2))):
        use = table(st.integers(0, 30))
        least, most = np.where(problem.allowed, use, 99).min(axis=1).sum(), use.max(axis=1).sum()
        limits.append(Limit(name=f"limit {number}", use=use, limit=int(least + draw(st.floats(0, 1)) * (most - least))))
    return problem, limits, inside(problem, draw(st.floats(0, 1)))


def all_limits(problem: AllocationProblem, limits: Sequence[Limit], budget: int) -> list[Limit]:
    return [Limit(name="budget", use=problem.size, limit=budget), *limits]


@settings(max_examples=400)
@given(case=limited())
def test_a_plan_within_limits_costs_what_the_best_of_all_plans_costs(
    case: tuple[AllocationProblem, list[Limit], int],
) -> None:
    problem, limits, budget = case
    best = cheapest_within(problem, all_limits(problem, limits, budget))
    if not np.isfinite(best):
        with pytest.raises(InputError, match="limit"):
            LimitedSolver(problem, limits).plan(budget)
        return
    plan = LimitedSolver(problem, limits).plan(budget)
    assert within(problem.columns(plan.choice), all_limits(problem, limits, budget))
    assert plan.cost == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert plan.bound <= best + 1e-12 * max(1, abs(best))
    assert plan.gap <= 1e-9


@settings(max_examples=100)
@given(case=limited())
def test_without_a_search_the_limits_are_kept_and_the_bound_holds(
    case: tuple[AllocationProblem, list[Limit], int],
) -> None:
    problem, limits, budget = case
    best = cheapest_within(problem, all_limits(problem, limits, budget))
    if np.isfinite(best):
        plan = LimitedSolver(problem, limits, state_limit=0).plan(budget)
        assert within(problem.columns(plan.choice), all_limits(problem, limits, budget))
        assert plan.bound <= best + 1e-9
        assert best - 1e-9 <= plan.cost
        assert plan.gap == pytest.approx((plan.cost - plan.bound) / max(abs(plan.cost), 5e-324), rel=1e-6, abs=1e-9)


def a_model(layers: int, seed: int, experts: bool = False) -> tuple[AllocationProblem, Limit, Limit, int]:
    """Layers of a model in NVFP4, NVFP4A16, FP8, MXFP8 and BF16: prefill, decode, and its parameters."""
    random = np.random.default_rng(seed)
    width = np.tile([1920 * 576, 576 * 576, 2 * 1536 * 576, 1536 * 576], layers)[:, None]
    bits, units = np.array([4.5, 4.5, 8.004, 8.25, 16.0]), np.array([1, 4, 2, 2, 4])
    scale = random.lognormal(0, 1.2, width.shape) * width / width.sum()
    cost = 0.22 * scale * np.array([1, 0.25, 0.11, 0.1, 0]) * random.lognormal(0, 0.25, (len(width), 5))
    size, share = (width * bits / 8).astype(np.int64), np.where(np.arange(len(width)) % 4 == 2, 8, 1)[:, None]
    prefill, decode = width * units, size // share if experts else size
    fastest, least = int(prefill.min(axis=1).sum()), int(decode.min(axis=1).sum())
    return (
        make(cost, size),
        Limit(name="prefill", use=prefill, limit=int(1.25 * fastest), unit=fastest),
        Limit(name="decode", use=decode, limit=int(1.2 * least), unit=least),
        int(width.sum()),
    )


@pytest.mark.parametrize("seed", range(3))
def test_on_a_model_plans_within_limits_are_proven_optimal(seed: int) -> None:
    problem, prefill, decode, parameters = a_model(30, seed)
    budgets = [int(bpp * parameters / 8) for bpp in (4.5, 5.0, 5.5, 7.0)]
    for limits in ([prefill], [prefill, decode]):
        plans = sweep(problem, budgets, limits)
        assert [plan.budget for plan in plans] == budgets
        for plan in plans:
            assert plan.size <= plan.budget
            assert all(limit.kept(problem, plan) for limit in limits)
            assert plan.gap <= 1e-9
        costs = [plan.cost for plan in plans]
        assert costs == sorted(costs, reverse=True)
    free = sweep(problem, budgets)
    assert all(bound.cost > best.cost for bound, best in zip(plans, free, strict=True)), "the limits bind"


def test_where_experts_have_bytes_of_their_own_the_gap_is_honest() -> None:
    problem, prefill, decode, parameters = a_model(12, 0, experts=True)
    (plan,) = sweep(problem, [5 * parameters // 8], [prefill, decode])
    assert prefill.kept(problem, plan)
    assert decode.kept(problem, plan)
    assert plan.gap < 0.05


def test_a_limit_that_does_not_bind_changes_nothing() -> None:
    problem, prefill, _, parameters = a_model(10, 0)
    loose = Limit(name="prefill", use=prefill.use, limit=4 * prefill.unit, unit=prefill.unit)
    budgets = [int(bpp * parameters / 8) for bpp in (4.6, 6.0)]
    assert sweep(problem, budgets, [loose]) == sweep(problem, budgets)


def test_a_limit_on_what_are_bytes_is_a_budget() -> None:
    problem, _, decode, parameters = a_model(10, 0)
    (plan,) = sweep(problem, [parameters], [decode])
    (same,) = sweep(problem, [decode.limit])
    assert (plan.choice, plan.bound, plan.budget) == (same.choice, same.bound, parameters)


def test_a_limit_that_cannot_be_kept_names_the_one_that_can() -> None:
    problem = make([[0.0, 1.0], [0.0, 1.0]], [[2, 4], [2, 4]])
    slow = Limit(name="prefill", use=np.array([[3, 1], [3, 1]]), limit=2, unit=2)
    with pytest.raises(InputError, match=r"prefill 1: no plan within the budget keeps it, .* is 2\.0000; allow that"):
        LimitedSolver(problem, [slow]).plan(6)
    assert LimitedSolver(problem, [Limit(name="prefill", use=slow.use, limit=4, unit=2)]).plan(6).size == 6
    with pytest.raises(InputError, match=r"decode 1: .* is 2\.0000"):
        LimitedSolver(problem, [Limit(name="decode", use=problem.size, limit=2, unit=2)]).plan(6)


def test_two_limits_that_exclude_each_other_are_refused() -> None:
    problem = make([[0.0, 1.0]], [[1, 1]])
    limits = [Limit(name=name, use=np.array([use]), limit=1) for name, use in (("a", [1, 2]), ("b", [2, 1]))]
    with pytest.raises(InputError, match=r"b 1: no plan within the budget keeps it, the least that one takes is 2"):
        LimitedSolver(problem, limits).plan(5)


def test_the_dual_of_two_limits_is_the_bound_of_the_linear_program() -> None:
    """SciPy's, for the same relaxation."""
    from scipy.optimize import linprog

    problem, prefill, decode, parameters = a_model(5, 3, experts=True)
    limits = all_limits(problem, [prefill, decode], 5 * parameters // 8)
    fastest = np.zeros(len(problem.groups), dtype=np.int64)
    groups, formats = problem.cost.shape
    found = linprog(
        problem.cost.ravel(),
        A_ub=np.stack([limit.use.ravel() / limit.limit for limit in limits]),
        b_ub=np.ones(3),
        A_eq=np.kron(np.eye(groups), np.ones(formats)),
        b_eq=np.ones(groups),
    )
    assert Dual(problem, limits, fastest).bound == pytest.approx(found.fun, rel=1e-6)


def test_a_search_of_single_changes_and_pairs_ends_where_none_helps() -> None:
    """One group must pay for another: no single change is possible, a pair is."""
    cost, size = np.array([[5.0, 0.0], [0.0, 1.0]]), np.array([[1, 2], [2, 1]])
    columns = improved(np.array([0, 0]), cost, limits=(Limit(name="budget", use=size, limit=3),))
    assert columns.tolist() == [1, 1]


# Times --------------------------------------------------------------------------------------------------------------


def test_rates_follow_the_operands_and_what_a_card_has() -> None:
    def rate(name: FormatName, gpu: GpuName) -> float:
        card = GPUS[gpu]
        return card.rate(FORMATS[name].product_bits(card.capability)) / 1e12

    b200 = {name: rate(name, GpuName.B200) for name in FormatName}
    assert b200 == {
        "INT3A16": 2250, "INT4": 2250, "INT6A16": 2250, "INT8A16": 2250, "NVFP4A16": 2250, "BF16": 2250,
        "MXFP4": 9000, "NVFP4": 9000, "MXFP4A8": 4500, "FP8": 4500, "FP8_BLOCK": 4500, "MXFP8": 4500,
        "INT8": 2250, "INT4A8": 2250,  # which do not run there
    }  # fmt: skip
    h100 = {name: rate(name, GpuName.H100) for name in FormatName}
    eight_bits = {name for name, value in h100.items() if value == 1979}
    assert eight_bits == {"FP8", "FP8_BLOCK", "INT8", "INT4A8", "MXFP4A8"}, "the rest is decoded to 16 bits there"
    assert {rate(name, GpuName.A100) for name in FormatName} == {312}
    for card in GPUS.values():
        assert {16} <= set(card.products) <= {4, 8, 16}
        rates = [card.rate(bits) for bits in (4, 8, 16)]
        assert rates == sorted(rates, reverse=True)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, families: dict[str, Path]) -> dict[str, Run]:
    directory = tmp_path_factory.mktemp("layouts")
    return {
        name: Run(configuration(directory / name, families[name], "formats=[NVFP4, NVFP4A16, FP8, BF16]", *more))
        for name, more in {"qwen3_moe": (), "qwen3_5_moe": ("model.quantize_lm_head=true",)}.items()
    }


def test_times_count_what_a_token_passes(layouts: dict[str, Run]) -> None:
    """Experts by their share; a vision tower in neither, an output head in decode, a draft head in both."""
    for run in layouts.values():
        layout, sizes = run.layout, run.sizes
        times = Times.of(layout, sizes.formats, sizes.weights, GpuName.B200)
        for row, group in enumerate(layout.groups):
            kind, share = layout.block_of[group.name].kind, layout.top_k / group.experts if group.experts else 1
            tower = kind in (BlockKind.VISION, BlockKind.MERGER)
            prompt = 0 if tower or kind is BlockKind.HEAD else share * group.parameters
            assert times.prefill[row].tolist() == [prompt, 4 * prompt, 2 * prompt, 4 * prompt]
            assert times.decode[row] == pytest.approx(0 if tower else share * sizes.weights[row], abs=1)
        bf16 = times.of_plan(np.full(len(layout.groups), 3), LimitsConfig())
        passed = sum(times.prefill[:, 0])
        assert bf16.prefill_seconds == pytest.approx(2 * passed / 2250e12)
        assert bf16.decode_seconds == pytest.approx(times.decode[:, 3].sum() / 8e12)
        assert bf16.prefill == 4
    kinds = {layouts["qwen3_5_moe"].layout.block_of[group.name].kind for group in layouts["qwen3_5_moe"].layout.groups}
    assert {BlockKind.HEAD, BlockKind.DRAFT, BlockKind.DECODER} <= kinds


# Whole runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished tiny run that was started with a limit; do not write into it but for plans."""
    directory = tmp_path_factory.mktemp("limits")
    source = make_checkpoint(directory / "source", "llama", layers=3)
    config = configuration(directory / "run", source, "formats=[NVFP4, FP8, BF16]", "allocation.limits.prefill=1.25")
    Run(config, open_workers=in_process()).measure()
    return config


def limited_by(config: Config, **limits: Any) -> Config:
    return config.model_copy(update={"allocation": AllocationConfig(limits=LimitsConfig(**limits))})


def test_under_limits_nvfp4a16_joins_and_plans_keep_them(measured: Config) -> None:
    assert measured.formats == ("NVFP4", "FP8", "BF16")
    assert measured.paired_formats == ("NVFP4", "NVFP4A16", "FP8", "BF16")
    losses = []
    for prefill in (1.0, 1.25, 2.0, 4.0):
        planner = Run(limited_by(measured, prefill=prefill), open_workers=unopened).measured().planner
        plan = planner.plan_for(BudgetConfig(bpp=4.5))
        assert plan.times.prefill <= prefill
        assert (plan.times.prefill_limit, plan.times.decode_limit, plan.times.gpu) == (prefill, None, "b200")
        assert plan.times.decode == 1, "all of it has 4.5 bits"
        assert plan.gap <= 1e-9
        assert (plan.groups[FormatName.NVFP4A16] > 0) == (prefill > 1)
        losses.append(plan.predicted_loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    both = Run(limited_by(measured, prefill=1.5, decode=1.1), open_workers=unopened).measured().sweep
    assert both.knee is not None
    assert both.knee.predicted_loss >= min(found.predicted_loss for found in both.targets)
    for found in both.targets:
        assert found.times.prefill <= 1.5
        assert found.times.decode <= 1.1
        assert found.bpp <= 1.1 * 4.5


def test_without_limits_a_finished_run_is_planned_without_what_they_added(measured: Config) -> None:
    plan = Run(limited_by(measured), open_workers=unopened).measured().plan
    assert set(plan.groups) == {"NVFP4", "FP8", "BF16"}
    assert plan.times.prefill_limit is None


def test_a_run_that_was_measured_without_it_is_planned_from_what_is_there(tmp_path: Path) -> None:
    config = configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"))
    Run(config, open_workers=in_process()).measure()
    said: list[Event] = []
    run = Run(limited_by(config, prefill=1.25), on_event=said.append, open_workers=unopened)
    (notice,) = said
    assert isinstance(notice, Notice)
    assert "measured without NVFP4A16" in notice.message
    plan = run.measured().plan
    assert set(plan.groups) == {"NVFP4", "MXFP8", "BF16"}
    assert plan.times.prefill <= 1.25


def test_inspect_states_both_times_and_refuses_a_limit_out_of_reach(measured: Config) -> None:
    found = {entry.format: entry for entry in inspect(measured).uniform}
    assert [entry.times.prefill for entry in found.values()] == [1, 4, 2, 4]
    assert [entry.times.decode for entry in found.values()] == pytest.approx(
        [entry.bpp / 4.5 for entry in found.values()]
    )
    force = {"match": "*", "format": "BF16"}
    allocation = AllocationConfig.model_validate({"limits": {"prefill": 1.25}, "force": [force]})
    slow = measured.model_copy(update={"allocation": allocation, "budget": BudgetConfig(bpp=16)})
    with pytest.raises(InputError, match=r"allocation\.limits\.prefill 1\.25: .* is 4\.0000; allow that"):
        inspect(slow)


def test_the_sweep_shows_the_times_and_their_basis(measured: Config) -> None:
    from rich.console import Console

    console = Console(record=True, width=200)
    sweep_command.render(Run(measured, open_workers=unopened).measured().sweep, console)
    text = console.export_text()
    assert "prefill  decode" in text
    assert "by the roofline of b200; limits: prefill 1.25" in text


def test_the_surface_falls_with_bytes_and_with_time_and_no_plan_is_below_it(measured: Config) -> None:
    planner = Run(measured, open_workers=unopened).measured().planner
    found = surface(planner)
    assert [each.prefill for each in found] == [1.0, 1.1, 1.25, 1.5, 2.0, None]
    for tight, loose in itertools.pairwise(found):
        assert (np.diff(tight.cost) <= 1e-12).all()
        assert tight.bytes.tolist() == loose.bytes.tolist()
        assert (tight.cost >= loose.cost - 1e-12).all()
    place = 8
    plan = planner.plan_for(BudgetConfig(bpp=planner.sizes.bpp(int(found[2].bytes[place]))))
    assert plan.predicted_loss >= found[2].cost[place] - 1e-12
    plain = Run(limited_by(measured), open_workers=unopened).measured().planner
    assert surface(plain) == [], "no two formats have the same bytes"


def test_the_mixture_by_hand_has_the_mlp_in_four_bits_and_the_rest_of_a_layer_in_eight(
    measured: Config, layouts: dict[str, Run]
) -> None:
    planner = Run(measured, open_workers=unopened).measured().planner
    (found,) = (entry for entry in baselines(planner, planner.sweep.targets) if entry.kind == "by_hand")
    assert found.label == "MLP NVFP4, attention FP8"
    for name, chosen in found.choice.items():
        assert chosen == ("NVFP4" if ".mlp." in name else "FP8")
    for run in layouts.values():
        mixed = vendor_mixture(run.layout, run.sizes)
        assert mixed is not None
        for name, chosen in mixed.choice.items():
            decoder = run.layout.block_of[name].kind is BlockKind.DECODER
            expected = ("NVFP4" if ".mlp." in name else "FP8") if decoder else "BF16"
            row = [group.name for group in run.layout.groups].index(name)
            assert chosen == expected or not run.sizes.allowed[row, run.sizes.formats.index(FormatName(expected))]
    plain = measured.model_copy(update={"formats": (FormatName.NVFP4, FormatName.MXFP8)})
    assert vendor_mixture(run.layout, measure(run.layout, plain.formats, ignored_bytes=0, other_bytes=0)) is None


def test_the_report_and_the_card_show_times_and_the_picture(measured: Config) -> None:
    known = Run(measured, open_workers=unopened).measured()
    found = known.findings(known.plan)
    assert [curve.prefill for curve in found.surface] == [1.0, 1.1, 1.25, 1.5, 2.0, None]
    html = page(found)
    drawn = html.partition('id="surface-chart"')[2].partition("</ul>")[0]
    assert drawn.count("<polyline") == 6
    assert "prefill ≤ 1.25" in drawn
    assert "limits: prefill 1.25" in html
    assert "surface" in plots(found)
    plain = Run(limited_by(measured), open_workers=unopened).measured()
    without = plain.findings(plain.plan)
    assert "surface-chart" not in page(without)
    assert "surface" not in plots(without)


def test_the_table_of_cards_is_the_documentation_s() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \|$", (ROOT / "docs/budgets.md").read_text(), re.MULTILINE)
    documented = {name: tuple(cell.strip() for cell in cells.split(" |")) for name, cells in rows if name != "gpu"}
    assert documented == {
        str(name): (*(gpu.products.get(bits, "") for bits in (4, 8, 16)), gpu.bandwidth) for name, gpu in GPUS.items()
    }
