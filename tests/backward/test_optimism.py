"""Claims about how optimistic prices are: what fitting does is told from which tokens happen to be held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismaquant_ray.backward.optimism import NONE, optimism
from prismaquant_ray.block_records import BackwardRecord, Price, PriceOn
from prismaquant_ray.formats import FormatName

NVFP4, NVFP4A16, FP8, BF16 = FormatName.NVFP4, FormatName.NVFP4A16, FormatName.FP8, FormatName.BF16


def made(
    fitting: float, heaviness: float, noise: float = 0.0, seed: int = 0, blocks: int = 40, activations: float = 2.0
) -> list[BackwardRecord]:
    """Records where weights cost `fitting` times as much on held-out tokens, all of which cost `heaviness` times more.

    One token in eight is held out.
    """
    dice = np.random.default_rng(seed)

    def on(weight: float, activation: float) -> PriceOn:
        return PriceOn(cost=weight + activation, standard_error=0.0, weight_cost=weight, activation_cost=activation)

    def price(rounds: bool) -> Price:
        weight, activation = dice.lognormal(), activations * dice.lognormal() if rounds else 0.0
        chance = np.exp(noise * dice.normal(size=2))
        fitted = on(weight, activation)
        held_out = on(weight * fitting * heaviness * chance[0], activation * heaviness * chance[1])
        found = on(
            *((7 * getattr(fitted, part) + getattr(held_out, part)) / 8 for part in ("weight_cost", "activation_cost"))
        )
        return Price(**{name: getattr(found, name) for name in PriceOn.__slots__}, held_out=held_out, fitted=fitted)

    return [
        BackwardRecord(
            groups={f"{index}.{name}": {NVFP4: price(True), NVFP4A16: price(False)} for name in ("qkv", "o")},
            fisher_trace={},
            tokens=800,
            held_out_tokens=100,
        )
        for index in range(blocks)
    ]


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 3.0), st.floats(0.3, 3.0))
def test_tokens_that_cost_more_whatever_the_rounding_are_no_optimism(fitting: float, heaviness: float) -> None:
    found = optimism([NVFP4, BF16], made(fitting, heaviness))
    assert set(found) == {NVFP4}
    # The ratio is to all tokens, of which one in eight is held out.
    weights, control = 8 * fitting * heaviness / (7 + fitting * heaviness), 8 * heaviness / (7 + heaviness)
    assert found[NVFP4].ratio == pytest.approx(weights / control)


def test_what_may_be_chance_changes_no_price() -> None:
    sure = optimism([NVFP4], made(1.5, 1.0, noise=0.05))[NVFP4]
    assert sure.ratio == pytest.approx(8 * 1.5 / 8.5, rel=0.05)
    assert sure.factor == pytest.approx(sure.ratio, rel=0.01)
    for seed in range(20):
        nothing = optimism([NVFP4], made(1.0, 1.0, noise=0.5, seed=seed))[NVFP4]
        if abs(nothing.ratio - 1.0) <= nothing.standard_error:
            assert nothing.factor == 1.0
        assert abs(nothing.factor - 1.0) < abs(nothing.ratio - 1.0)


def test_the_error_is_that_of_repeated_trials() -> None:
    found = [optimism([NVFP4], made(1.2, 0.8, noise=0.4, seed=seed))[NVFP4] for seed in range(200)]
    spread = np.std([each.ratio for each in found])
    assert np.mean([each.standard_error for each in found]) == pytest.approx(spread, rel=0.25)


def test_formats_that_keep_activations_are_compared_with_those_that_round_them() -> None:
    both = optimism([NVFP4, NVFP4A16], made(1.4, 2.0))
    assert both[NVFP4A16].ratio == pytest.approx(both[NVFP4].ratio)


def test_without_anything_held_out_nothing_is_known() -> None:
    records = made(1.5, 1.0)
    none = [BackwardRecord(groups=each.groups, fisher_trace={}, tokens=800, held_out_tokens=0) for each in records]
    assert optimism([NVFP4, FP8], none) == {NVFP4: NONE, FP8: NONE}
    assert optimism([FP8], records) == {FP8: NONE}
