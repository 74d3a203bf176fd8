"""Claims about the public surface of a run: its prices, its candidates, and plans of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.pipeline.library import OpenRun
from prismaquant_ray import FormatName, InputError, dequantize_weight, solve
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.inprocess import in_process
from tests.runs import configuration
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    directory = tmp_path_factory.mktemp("library")
    source = make_checkpoint(directory / "source", "llama")
    return OpenRun(configuration(directory, source), open_workers=in_process())


def test_the_plan_of_a_choice_is_assembled_as_it_says(run: OpenRun, tmp_path: Path) -> None:
    groups = run.layout.groups
    choice = {group.name: (FormatName.NVFP4, FormatName.MXFP8)[place % 2] for place, group in enumerate(groups)}
    plan = run.plan_of(choice, "every second")
    assert plan.choice == choice
    repository = run.assemble(plan, tmp_path / "repository")
    assert repository.plan == plan.summary
    assert json.loads((tmp_path / "repository" / "prismaquant.json").read_text())["choice"] == choice


def test_the_gap_of_a_choice_is_to_the_best_plan_of_as_many_bytes(run: OpenRun) -> None:
    problem = run.problem()
    best = run.plan()
    again = run.plan_of(best.choice, "again")
    assert replace(again, target=best.target, bound=best.bound, gap=best.gap) == best
    assert again.gap == pytest.approx(0.0, abs=1e-9)
    worse = run.plan_of(dict.fromkeys(problem.groups, FormatName.MXFP8), "all MXFP8")
    assert worse.bound <= solve(problem, worse.weight_bytes).cost <= worse.predicted_loss
    assert worse.gap == pytest.approx((worse.predicted_loss - worse.bound) / worse.predicted_loss)


def test_a_choice_that_is_no_plan_is_refused(run: OpenRun) -> None:
    first, *others = run.problem().groups
    with pytest.raises(InputError, match=f"{first} cannot be None; it can be NVFP4, MXFP8, BF16"):
        run.plan_of(dict.fromkeys(others, FormatName.BF16), "incomplete")
    with pytest.raises(InputError, match=f"{first} cannot be INT4"):
        run.plan_of(dict.fromkeys((first, *others), FormatName.INT4), "not measured")


def test_plans_of_one_name_have_findings_of_their_own(run: OpenRun) -> None:
    found = [
        run.findings(run.plan_of(dict.fromkeys(run.problem().groups, name), "mine")).plan.bpp
        for name in (FormatName.NVFP4, FormatName.MXFP8)
    ]
    assert found[0] < found[1]


def test_prices_are_those_that_plans_minimise(run: OpenRun) -> None:
    prices, problem = run.prices(), run.problem()
    assert prices.groups == problem.groups
    np.testing.assert_array_equal(prices.token_fisher, problem.cost)


def test_candidates_decode_to_roundings_of_what_ships(run: OpenRun) -> None:
    group = run.layout.groups[0]
    source = run.shipped(dict.fromkeys(run.problem().groups, FormatName.NVFP4))
    alone = Checkpoint(Store(run.config.model.source))
    as_it_is = run.shipped(dict.fromkeys(run.problem().groups, FormatName.BF16))
    for linear in group.linears:
        assert torch.equal(*(each.read(linear.sources)[linear.sources[0]] for each in (as_it_is, alone)))
    for linear in group.linears:
        weight = source.read(linear.sources)[linear.sources[0]].float()
        errors = []
        for name in (FormatName.NVFP4, FormatName.MXFP8):
            tensors = run.candidate(group.name, name)
            own = {k.removeprefix(f"{linear.name}."): v for k, v in tensors.items() if k.startswith(f"{linear.name}.")}
            errors.append(float((dequantize_weight(own, name).float() - weight).norm() / weight.norm()))
        assert errors[1] < errors[0] < 0.2
    assert run.candidate(group.name, FormatName.BF16) == {}
    with pytest.raises(InputError, match=r"no group model\.nothing"):
        run.candidate("model.nothing", FormatName.NVFP4)
    with pytest.raises(InputError, match="INT4"):
        run.candidate(group.name, "INT4")
