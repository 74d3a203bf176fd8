"""The public surface: its names, its page, its examples, and how one matrix is rounded by itself."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prismaquant_ray
from jobs.pipeline import library
from jobs.pipeline.run import Run
from prismaquant_ray import (
    BudgetConfig,
    Event,
    FormatName,
    InputError,
    dequantize_weight,
    quantize_weight,
)
from prismaquant_ray.formats import FORMATS
from tests.inprocess import in_process
from tests.runs import configuration
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[1]


# Names ----------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(prismaquant_ray.__all__) == sorted(prismaquant_ray._HOME_OF)
    assert set(prismaquant_ray.__all__) <= set(dir(prismaquant_ray))
    page = (ROOT / "docs/api.md").read_text()
    for name in prismaquant_ray.__all__:
        assert getattr(prismaquant_ray, name).__doc__, name
        assert f"### {name}\n" in page, name
    with pytest.raises(AttributeError, match="quantise"):
        _ = prismaquant_ray.quantise  # type: ignore[attr-defined]


def test_the_page_is_that_of_the_signatures() -> None:
    render = runpy.run_path(str(ROOT / "docs/api.py"))["render"]
    assert render() == (ROOT / "docs/api.md").read_text(), "run python docs/api.py > docs/api.md"


@pytest.mark.parametrize(
    "code",
    [
        "import prismaquant_ray",
        "from prismaquant_ray import load_config, solve, frontier, FormatName, InputError",
        "import jobs.commands.status, jobs.commands.publish, jobs.pipeline.publishing",
    ],
)
def test_importing_it_costs_no_torch(code: str) -> None:
    check = f"{code}; import sys; print(sorted({{'torch', 'transformers', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


# Examples -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its configuration, config.yaml."""
    place = tmp_path_factory.mktemp("api")
    configuration(place, make_checkpoint(place / "source", "llama"), sweep=(5.0, 6.0, 7.0))
    return place


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that the examples open take workers of this process."""
    monkeypatch.setitem(Run.__init__.__kwdefaults__, "open_workers", in_process())
    monkeypatch.setitem(library.OpenRun.__init__.__kwdefaults__, "open_workers", in_process())


@pytest.mark.usefixtures("without_ray")
def test_the_examples_of_the_page_run(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    introduction = (ROOT / "docs/api.md").read_text().partition("## Configuration")[0]
    blocks = re.findall(r"```python\n(.*?)```", introduction, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(directory)
    for block in blocks:
        exec(block, {})  # noqa: S102 - our own page


@pytest.mark.usefixtures("without_ray")
def test_the_long_example_runs(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["example", str(directory / "config.yaml"), str(tmp_path)])
    runpy.run_path(str(ROOT / "docs/library_example.py"))
    out = capsys.readouterr().out
    assert "bits: predicted loss" in out
    assert json.loads((tmp_path / "copy/config.json").read_text())["model_type"] == "llama"


@pytest.mark.usefixtures("without_ray")
def test_a_run_tells_events_and_prints_nothing(
    directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = prismaquant_ray.load_config(directory / "config.yaml", [f"store.run={tmp_path / 'run'}"])
    told: list[Event] = []
    run = prismaquant_ray.open_run(config, on_event=told.append)
    summary = run.measure()
    assert summary.groups == 8
    assert {"RunBegan", "WorkerReady", "PassBegan", "StepDone", "ShardDone", "RunEnded"} <= {
        type(event).__name__ for event in told
    }
    assert run.plan() == run.plan(config.budget)
    assert run.plan(BudgetConfig(bpp=7.0)).bpp <= 7.0
    plans = run.sweep().targets
    assert [plan.target for plan in plans] == ["5bpp", "6bpp", "7bpp"]
    written = run.assemble(plans[0], tmp_path / "other")
    assert json.loads((tmp_path / "other/prismaquant.json").read_text())["run"]["target"] == "5bpp"
    assert written.plan.target == "5bpp"
    assert run.findings().plan.target == config.budget.target
    assert capfd.readouterr() == ("", "")


# One weight -----------------------------------------------------------------------------------------------------


def draw(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(FormatName))
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_weight_is_stored_as_a_run_stores_it(name: FormatName, calibrated: bool) -> None:
    """The tensors are those of the format, and the decoded weight is near."""
    from prismaquant_ray.forward.candidates import shipped
    from prismaquant_ray.layout import LinearSpec

    weight, inputs = draw(128, 128, 0), draw(300, 128, 1)
    tensors = quantize_weight(weight, name, inputs if calibrated else None)
    linear = LinearSpec(name="a", sources=("a.weight",), out_features=128, in_features=128)
    expected = shipped(name, linear) or {"weight": ("BF16", (128, 128))}
    if not calibrated:
        expected = {suffix: entry for suffix, entry in expected.items() if suffix != "input_global_scale"}
    assert {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()} == {
        suffix: shape for suffix, (_, shape) in expected.items()
    }
    decoded = dequantize_weight(tensors, name)
    assert decoded.dtype == torch.bfloat16
    assert float((decoded.float() - weight).square().mean()) < (0.06 if name == "INT3A16" else 0.02)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_calibrated_rounding_is_no_worse_than_nearest_on_the_tokens_that_judge_it(seed: int) -> None:
    from prismaquant_ray.forward.scale_search import nearest

    mixing = draw(128, 128, seed + 1)
    weight, inputs = draw(32, 128, seed), draw(512, 128, seed + 2) @ mixing
    codec = FORMATS[FormatName.NVFP4].codec
    assert codec is not None
    source = weight.to(torch.bfloat16).float()
    plain = codec.dequantized(nearest(source, codec, codec.global_scale(float(source.abs().max())))).float()
    ours = dequantize_weight(quantize_weight(weight, "NVFP4", inputs), "NVFP4").float()
    judges = inputs[7::8]
    errors = [float(((decoded - source) @ judges.T).square().sum()) for decoded in (ours, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 32), "NVFP5"), "there is no format NVFP5; there are INT3A16, "),
        ((torch.zeros(4, 20), "NVFP4"), r"a weight of 4 × 20 cannot be NVFP4 \("),
        ((torch.zeros(4, 4, 32), "NVFP4"), "a weight has two dimensions"),
        ((torch.zeros(4, 32), "NVFP4", torch.zeros(8, 16)), r"inputs must be \(tokens, 32\)"),
        ((torch.zeros(4, 32), "NVFP4", torch.zeros(0, 32)), r"inputs must be \(tokens, 32\)"),
    ],
)
def test_bad_arguments_are_refused_in_a_line(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_weight(*arguments)


def test_the_environment_is_as_it_was() -> None:
    before = dict(os.environ)
    quantize_weight(draw(8, 32, 0), "INT4")
    assert dict(os.environ) == before
