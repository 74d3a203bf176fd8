"""Whole jobs with and without factors in norms and weights: what is in the repository, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jobs.pipeline.assembly import verify
from prismaquant_ray.formats import FormatName
from prismaquant_ray.records import FACTORS
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.runs import assembled, configuration, measured
from tests.tiny import make_checkpoint
from tests.tiny_families import make_family

NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / request.param
    return make_checkpoint(directory, "llama") if request.param == "llama" else make_family(directory, "qwen3_moe")


def test_without_it_everything_that_is_not_quantized_is_the_sources(source: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, source, "rounding.equalize=false")
    run = measured(config)
    assembled(run)
    assert not [key for key in run.store.list("forward") if FACTORS in key]
    ours, theirs = Checkpoint(Store(config.store.output)), Checkpoint(Store(source))
    found = ours.tensors
    kept = [name for name, info in theirs.tensors.items() if name in found and found[name].dtype == info.dtype]
    assert NORM in kept
    for name in kept:
        assert torch.equal(ours.read([name])[name], theirs.read([name])[name]), name
    assert "inputs are evened out" not in (config.store.output / "README.md").read_text()
    assert verify(config).ok


def test_with_it_norms_are_the_sources_times_the_recorded_factors(source: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, source)
    run = measured(config)
    choice = dict.fromkeys((group.name for group in run.layout.groups), FormatName.NVFP4)
    known = run.measured()
    shipped, theirs = known.shipped(choice), Checkpoint(Store(source))
    changed = [
        name for name in theirs.tensors if not torch.equal(*(each.read([name])[name] for each in (shipped, theirs)))
    ]
    assert any(name.endswith("layernorm.weight") for name in changed)
    assembled(run, known.planner.plan_of(choice, "all NVFP4"))
    found = verify(config)
    assert found.ok, found.problems
    ours = Checkpoint(Store(config.store.output))
    for name in changed:
        if name in ours.tensors:
            assert torch.equal(ours.read([name])[name], shipped.read([name])[name]), name
    card = " ".join((config.store.output / "README.md").read_text().split())
    assert "LoRA adapters that were trained on the source do not fit" in card


def test_a_plan_that_leaves_everything_leaves_the_source_as_it_is(source: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, source, bpp=16.0)
    run = measured(config)
    choice = dict.fromkeys((group.name for group in run.layout.groups), FormatName.BF16)
    assembled(run, run.measured().planner.plan_of(choice, "as it is"))
    ours, theirs = Checkpoint(Store(config.store.output)), Checkpoint(Store(source))
    for name in theirs.tensors:
        assert torch.equal(ours.read([name])[name], theirs.read([name])[name]), name
    assert "quantization_config" not in json.loads((config.store.output / "config.json").read_text())
