"""Claims about gains that are learned from measured plans: wrong prices are found out, right ones are left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.pipeline.measured import Measured
from prismaquant_ray.allocation.refine import Features, learned, neighbours, refined
from tests.runs import configuration, measured
from tests.tiny import make_checkpoint


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 5))
def test_gains_are_found_where_measurements_are_exact(seed: int, features: int) -> None:
    dice = np.random.default_rng(seed)
    gains = dice.uniform(0.5, 2.0, features)
    sums = dice.uniform(0.01, 0.1, (3 * features, features))
    losses = sums @ gains
    errors = np.full(len(sums), 1e-4)
    np.testing.assert_allclose(learned(sums, losses.tolist(), errors.tolist()), gains, rtol=0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_measurements_that_say_nothing_leave_prices_alone(seed: int) -> None:
    dice = np.random.default_rng(seed)
    sums = dice.uniform(0.01, 0.1, (8, 3))
    losses = sums.sum(1) * dice.uniform(0.5, 1.5, 8)
    np.testing.assert_allclose(learned(sums, losses.tolist(), [100.0] * 8), 1.0, atol=1e-3)
    exact = learned(sums, sums.sum(1).tolist(), [1e-4] * 8)
    np.testing.assert_allclose(exact, 1.0, atol=1e-9)


def test_the_minimum_is_that_of_the_formula() -> None:
    """By gradient descent of nothing but the stated sum."""
    dice = np.random.default_rng(3)
    x, s = dice.uniform(0.01, 0.1, (5, 3)), dice.uniform(0.002, 0.01, 5)
    y = x @ [1.3, 0.8, 1.0] + dice.normal(0, 0.002, 5)

    def objective(theta: np.ndarray) -> float:
        left = ((y[1:] - y[0]) - (x[1:] - x[0]) @ theta) / s[1:]
        return float(left @ left + ((y[0] - x[0] @ theta) / s[0]) ** 2 + np.square((theta - 1) / 0.5).sum())

    found = learned(x, y.tolist(), s.tolist())
    for direction in np.vstack([np.eye(3), -np.eye(3)]):
        assert objective(found) < objective(found + 1e-4 * direction)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    directory = tmp_path_factory.mktemp("refine")
    source = make_checkpoint(directory / "source", "llama", layers=6)
    return measured(configuration(directory, source, "rounding.gptq=null", bpp=6.5)).measured()


def test_features_add_up_to_the_prediction_and_neighbours_keep_the_budget(known: Measured) -> None:
    planner, plan = known.planner, known.plan
    features = Features.of(planner)
    assert {"qkv_proj NVFP4", "down_proj MXFP8"} <= set(features.names)
    bf16 = sum(planner.table.token_fisher[row, -1] for row, name in enumerate(plan.choice.values()) if name == "BF16")
    assert features.sums(planner, plan.choice).sum() + bf16 == pytest.approx(plan.predicted_loss)
    others = neighbours(planner, plan, features, 5)
    assert 1 < len(others) <= 5
    choices = [tuple(each.choice.values()) for each in (plan, *others)]
    assert len(set(choices)) == len(choices)
    assert all(each.weight_bytes <= 6.5 * known.sizes.parameters / 8 for each in others)


def test_a_kind_of_group_that_costs_more_than_its_price_gets_more_bytes(known: Measured, tmp_path: Path) -> None:
    planner, plan = known.planner, known.plan
    features = Features.of(planner)
    same = refined(planner, plan, features, np.ones(len(features.names)))
    assert same.choice == plan.choice
    gains = np.array([8.0 if name == "down_proj NVFP4" else 1.0 for name in features.names])
    other = refined(planner, plan, features, gains)

    def small(choice: dict[str, str]) -> int:
        return sum(name == "NVFP4" for group, name in choice.items() if group.endswith("down_proj"))

    assert small(other.choice) < small(plan.choice)
    assert other.weight_bytes <= 6.5 * known.sizes.parameters / 8
    # Its prediction is by the prices, by which it is worse.
    assert other.predicted_loss >= plan.predicted_loss
