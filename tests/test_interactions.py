"""Claims about interactions: the quadratic form is the sum it stands for, a search never makes it worse, and noise that
looks like a gain is neither believed nor reported as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from jobs import planning
from jobs.run import Run
from prismaquant_ray.allocation.interactions import Interactions, bytes_needed, refine
from prismaquant_ray.allocation.local_search import Resource, improved
from prismaquant_ray.allocation.problem import AllocationProblem
from prismaquant_ray.allocation.second_limit import SecondLimit, solver
from prismaquant_ray.config import AllocationConfig, Config
from prismaquant_ray.errors import ConfigError, InputError, ResourceError
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.sensitivity.cost import half_squares, price
from tests.inprocess import in_process, unopened
from tests.test_allocation import NAN
from tests.test_family_pipeline import configuration as seeing
from tests.test_pipeline import configuration
from tests.tiny import make_checkpoint

FORMATS = ("LOW", "HIGH", "BF16")
Vectors = Mapping[tuple[str, str], NDArray[np.float32]]


def problem_of(vectors: Vectors, groups: int, sizes: NDArray[np.int64] | None = None) -> AllocationProblem:
    """The additive problem that p vectors make; BF16 costs nothing, and what has no vector is not allowed."""
    names = tuple(f"g{i}" for i in range(groups))
    tokens = len(next(iter(vectors.values())))
    cost = np.full((groups, 3), NAN)
    cost[:, 2] = 0.0
    for (group, name), p in vectors.items():
        cost[names.index(group), FORMATS.index(name)] = 0.5 * np.square(p.astype(np.float64)).sum() / tokens
    if sizes is None:
        sizes = np.tile(np.array([[4, 8, 16]]), (groups, 1))
    return AllocationProblem(groups=names, formats=FORMATS, cost=cost, size=sizes)


def interactions_of(problem: AllocationProblem, vectors: Vectors, sequences: int) -> Interactions:
    tokens = len(next(iter(vectors.values())))
    return Interactions.of(
        problem.groups,
        problem.formats,
        problem.cost,
        ((group, name, p) for (group, name), p in vectors.items()),
        lengths=[tokens // sequences] * sequences,
    )


def noise(groups: int, tokens: int, seed: int, scale: float = 0.1) -> dict[tuple[str, str], NDArray[np.float32]]:
    """Errors that have nothing to do with each other; HIGH is a quarter of LOW."""
    random = np.random.default_rng(seed)
    return {
        (f"g{i}", name): (scale * factor * random.standard_normal(tokens)).astype(np.float32)
        for i in range(groups)
        for name, factor in (("LOW", 1.0), ("HIGH", 0.25))
    }


def half_mean_square(vectors: Vectors, choice: Mapping[str, str]) -> float:
    """q as it is defined: the p of all groups added up token by token."""
    tokens = len(next(iter(vectors.values())))
    total = np.zeros(tokens)
    for group, name in choice.items():
        if name != "BF16":
            total += vectors[group, name].astype(np.float64)
    return float(0.5 * np.square(total).sum() / tokens)


@given(seed=st.integers(0, 10**6), sequences=st.sampled_from([1, 3, 12]))
def test_q_is_half_the_mean_square_of_the_summed_errors(seed: int, sequences: int) -> None:
    vectors = noise(4, 24, seed)
    problem = problem_of(vectors, 4)
    found = interactions_of(problem, vectors, sequences)
    for choice in itertools.islice(itertools.product(FORMATS, repeat=4), seed % 7, None, 7):
        plan = dict(zip(problem.groups, choice, strict=True))
        assert found.quadratic(plan) == pytest.approx(half_mean_square(vectors, plan), rel=1e-12, abs=1e-15)


def test_the_diagonal_is_the_price_of_a_candidate() -> None:
    vectors = noise(3, 40, 0)
    problem = problem_of(vectors, 3)
    cost, pairs = interactions_of(problem, vectors, 5).split(interactions_of(problem, vectors, 5).total)
    for (group, name), p in vectors.items():
        tensor = torch.from_numpy(p)
        priced = price(tensor, half_squares(tensor.view(5, -1)), 40).cost
        at = problem.groups.index(group), FORMATS.index(name)
        assert cost[at] == pytest.approx(priced, rel=1e-12)
        assert pairs[3 * at[0] + at[1], 3 * at[0] + at[1]] == 0.0
    assert (cost[:, 2] == 0.0).all()


def test_sequences_of_any_length_count_by_their_tokens() -> None:
    vectors = noise(2, 30, 1)
    problem = problem_of(vectors, 2)
    entries = [(group, name, p) for (group, name), p in vectors.items()]
    uneven = Interactions.of(problem.groups, FORMATS, problem.cost, entries, lengths=[3, 17, 10])
    plan = {"g0": "LOW", "g1": "HIGH"}
    assert uneven.quadratic(plan) == pytest.approx(half_mean_square(vectors, plan), rel=1e-12)
    with pytest.raises(AssertionError, match="for 31 tokens"):
        Interactions.of(problem.groups, FORMATS, problem.cost, entries, lengths=[31])


def test_groups_with_a_loss_of_their_own_have_their_cost_and_nothing_else() -> None:
    vectors = noise(3, 40, 2)
    problem = problem_of(vectors, 3)
    entries = [(group, name, p) for (group, name), p in vectors.items() if group != "g2"]
    found = Interactions.of(problem.groups, FORMATS, problem.cost, entries, lengths=[8] * 5, apart={"g2"})
    rest = {"g0": "LOW", "g1": "LOW"}
    expected = half_mean_square(vectors, rest) + problem.cost[2, 0]
    assert found.quadratic({**rest, "g2": "LOW"}) == pytest.approx(expected, rel=1e-12)


def test_the_standard_error_of_q_shrinks_with_the_tokens() -> None:
    plan = {f"g{i}": "LOW" for i in range(4)}
    errors = []
    for tokens in (800, 80_000):
        vectors = noise(4, tokens, 3)
        found = interactions_of(problem_of(vectors, 4), vectors, 8)
        errors.append(found.standard_error(plan))
        # The true q is ½ · 4 · 0.01.
        assert abs(found.quadratic(plan) - 0.02) < 4 * errors[-1]
    assert errors[1] < errors[0] / 3
    assert interactions_of(problem_of(vectors, 4), vectors, 1).standard_error(plan) == 0.0


# The search -----------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[tuple[str, str], NDArray[np.float32]], AllocationProblem, SecondLimit, int]:
    """Few groups with errors that share a part, some formats not allowed, sizes that matter, two limits."""
    groups = draw(st.integers(2, 4))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    shared = random.standard_normal(48)
    vectors = {}
    for i in range(groups):
        for name, factor in (("LOW", 1.0), ("HIGH", 0.4)):
            if name == "LOW" or draw(st.booleans()):
                p = factor * (random.standard_normal(48) + draw(st.sampled_from([-2, 0, 2])) * shared)
                vectors[f"g{i}", name] = p.astype(np.float32)
    width = random.integers(1, 6, (groups, 1))
    problem = problem_of(vectors, groups, width * np.array([[4, 8, 16]]))
    use = np.zeros((groups, 3), dtype=np.int64)
    use[:, 2] = width[:, 0]
    second = SecondLimit(use=use, limit=int(draw(st.floats(0, 1)) * use.sum()))
    span = problem.maximum_bytes - problem.smallest_bytes
    return vectors, problem, second, problem.smallest_bytes + int(draw(st.floats(0, 1)) * span)


@settings(max_examples=150)
@given(case=cases(), bound=st.booleans())
def test_a_refinement_is_never_worse_never_over_and_keeps_the_limits(
    case: tuple[Vectors, AllocationProblem, SecondLimit, int], bound: bool
) -> None:
    vectors, problem, second, budget = case
    limit = second if bound else None
    found = interactions_of(problem, vectors, 6)
    plan = solver(problem, limit).plan(budget)
    result = refine(problem, plan, found, lambda cost: solver(problem.with_cost(cost), limit).plan(budget), limit)
    assert result.before == pytest.approx(half_mean_square(vectors, plan.choice), rel=1e-9, abs=1e-15)
    assert result.after == pytest.approx(half_mean_square(vectors, result.plan.choice), rel=1e-9, abs=1e-15)
    assert result.after <= result.before + 1e-15
    assert result.plan.size <= budget == result.plan.budget
    columns = problem.columns(result.plan.choice)
    assert problem.allowed[np.arange(len(columns)), columns].all()
    if bound:
        assert second.used(problem, result.plan) <= second.limit
    assert result.plan.bound == pytest.approx(plan.bound, rel=1e-9, abs=1e-12)
    assert result.plan.cost >= plan.bound - 1e-12
    assert 0.0 <= result.shrinkage <= 1.0


@settings(max_examples=150)
@given(case=cases())
def test_where_a_search_ends_no_change_of_two_groups_helps(
    case: tuple[Vectors, AllocationProblem, SecondLimit, int],
) -> None:
    vectors, problem, second, budget = case
    cost, pairs = interactions_of(problem, vectors, 6).split(interactions_of(problem, vectors, 6).total)
    cost = np.where(problem.allowed, cost, NAN)
    start = problem.columns(solver(problem, second).plan(budget).choice)
    resources = (Resource(problem.size, budget), Resource(second.use, second.limit))
    end = improved(start, cost, resources=resources, pairs=pairs)
    assert (improved(start, cost, resources=resources, pairs=pairs) == end).all()
    rows = np.arange(len(end))

    def q(columns: NDArray[np.int64]) -> float:
        choice = {group: FORMATS[j] for group, j in zip(problem.groups, columns.tolist(), strict=True)}
        return half_mean_square(vectors, choice)

    reached = q(end)
    assert reached <= q(start) + 1e-12
    for other in itertools.product(range(3), repeat=len(end)):
        columns = np.array(other)
        if not problem.allowed[rows, columns].all() or any(
            resource.use[rows, columns].sum() > resource.limit for resource in resources
        ):
            continue
        if len(end) == 2 or (columns != end).sum() <= 2:
            assert q(columns) >= reached - 1e-9 * max(1.0, reached)


# What a gain is worth -------------------------------------------------------------------------------------------


def test_a_gain_that_is_noise_is_neither_believed_nor_claimed() -> None:
    """Errors of 24 groups that have nothing to do with each other; a search that believes them finds a gain."""
    vectors, budget = noise(24, 400, 5), 24 * 6
    problem = problem_of(vectors, 24)
    found = interactions_of(problem, vectors, 8)
    plan = solver(problem, None).plan(budget)
    cost, pairs = found.split(found.total)
    resources = (Resource(problem.size, budget),)
    believing = improved(problem.columns(plan.choice), cost, resources=resources, pairs=pairs)
    chosen = {group: FORMATS[j] for group, j in zip(problem.groups, believing.tolist(), strict=True)}
    assert found.quadratic(chosen) < 0.9 * found.quadratic(plan.choice)
    fresh = noise(24, 40_000, 6)
    assert half_mean_square(fresh, chosen) > 0.95 * half_mean_square(fresh, plan.choice), "there was none"
    result = refine(problem, plan, found, lambda cost: solver(problem.with_cost(cost), None).plan(budget))
    assert result.shrinkage < 0.2
    assert result.before - result.after < 0.2 * result.before
    assert abs(result.crossfit_gain) < 0.1 * result.before


def test_errors_that_cancel_are_kept_together_and_the_gain_is_there_on_other_tokens() -> None:
    def vectors_of(seed: int, tokens: int) -> dict[tuple[str, str], NDArray[np.float32]]:
        """g0 and g1 make opposite errors; by themselves they are the dearest."""
        vectors = noise(4, tokens, seed)
        for i in range(4):
            vectors[f"g{i}", "HIGH"] = vectors[f"g{i}", "LOW"] * np.float32(0.5)
        for name in ("LOW", "HIGH"):
            vectors["g0", name] = vectors["g0", name] * np.float32(1.2)
            vectors["g1", name] = -vectors["g0", name]
        return vectors

    vectors, budget = vectors_of(7, 2000), 2 * 4 + 2 * 8
    problem = problem_of(vectors, 4)
    plan = solver(problem, None).plan(budget)
    assert list(plan.choice.values()) == ["HIGH", "HIGH", "LOW", "LOW"]
    result = refine(
        problem,
        plan,
        interactions_of(problem, vectors, 8),
        lambda cost: solver(problem.with_cost(cost), None).plan(budget),
    )
    assert list(result.plan.choice.values()) == ["LOW", "LOW", "HIGH", "HIGH"]
    assert result.shrinkage > 0.8
    fresh = vectors_of(8, 20_000)
    measured = half_mean_square(fresh, plan.choice) - half_mean_square(fresh, result.plan.choice)
    assert measured > 0.3 * result.before
    assert result.crossfit_gain == pytest.approx(measured, abs=4 * result.crossfit_standard_error)
    assert result.plan.cost > plan.cost, "without interactions it would be the dearer plan"


# Whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Config:
    directory = tmp_path_factory.mktemp("interactions")
    source = make_checkpoint(directory / "source", "llama", layers=2, tied=False)
    config = configuration(directory / "run", source, "model.quantize_lm_head=true")
    Run(config, open_workers=in_process()).measure()
    return config


def refining(config: Config, **allocation: object) -> Run:
    changed = AllocationConfig.model_validate({"interactions": True, **allocation})
    return Run(config.model_copy(update={"allocation": changed}), open_workers=unopened)


def test_a_run_prices_its_plans_with_interactions_and_says_what_refining_gained(measured: Config) -> None:
    run = refining(measured)
    found = planning.interactions(run)
    cost, pairs = found.split(found.total)
    assert cost == pytest.approx(run.table.token_fisher, rel=1e-9, abs=1e-15, nan_ok=True)
    assert (np.abs(pairs) > 0).any()
    plan = planning.allocate(run)
    assert plan["predicted_with_interactions"] == plan["refinement"]["after"] <= plan["refinement"]["before"]
    assert plan["bpp"] <= 6.0
    assert plan["predicted_loss"] >= plan["bound"]
    swept = planning.sweep_targets(run)
    assert [plan["target"] for plan in swept["refined"]] == [plan["target"] for plan in swept["targets"]]
    for before, after in zip(swept["targets"], swept["refined"], strict=True):
        assert before["predicted_with_interactions"] == after["refinement"]["before"]
        assert before["predicted_with_interactions"] == found.quadratic(before["choice"])
    plain = planning.sweep_targets(Run(measured, open_workers=unopened))
    assert "refined" not in plain
    assert [plan["choice"] for plan in plain["targets"]] == [plan["choice"] for plan in swept["targets"]]


def test_towers_and_drafts_keep_their_own_cost(tmp_path: Path, families: Mapping[str, Path]) -> None:
    config = seeing(tmp_path, families["qwen3_5"], "model.quantize_lm_head=true", images=2)
    Run(config, open_workers=in_process()).measure()
    run = refining(config)
    found = planning.interactions(run)
    cost, pairs = found.split(found.total)
    assert cost == pytest.approx(run.table.token_fisher, rel=1e-9, abs=1e-15, nan_ok=True)
    of = {
        kind: [i for i, g in enumerate(run.layout.groups) if run.layout.block_of[g.name].kind is kind]
        for kind in BlockKind
    }
    by_group = pairs.reshape(len(run.layout.groups), 3, len(run.layout.groups), 3)
    for kind in (BlockKind.VISION, BlockKind.MERGER, BlockKind.DRAFT):
        assert of[kind], "the model has one"
        assert not by_group[of[kind]].any()
    assert by_group[np.ix_(of[BlockKind.DECODER], [0], of[BlockKind.HEAD], [0])].any()


def test_too_large_a_matter_is_refused_with_its_size(measured: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.planning.free_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"interactions of \d+ candidates over \d+ tokens take .* GB"):
        planning.allocate(refining(measured))
    assert bytes_needed(640, 262_144, 960) < 10**9, "Qwen3.6-27B in two formats"


def test_interactions_of_another_objective_are_refused() -> None:
    with pytest.raises(ValueError, match="token_fisher only"):
        AllocationConfig(interactions=True, objective="fisher_trace")
    assert issubclass(ConfigError, InputError)
