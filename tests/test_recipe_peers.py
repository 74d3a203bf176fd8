"""Exported recipes in the tools that they are for: every Linear gets exactly the format of the plan.

Each tool has an environment of its own, which `make recipes` makes; `tests/recipe_check` has the programs that run in
them. ModelOpt 0.47 rounds to NVFP4, MXFP4 and MXFP8 on CUDA devices only, so here a plan with these is loaded and its
quantizers are read, and one of FP8 and INT4 is also calibrated and run.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.model.layout_builder import build_layout
from prismaquant_ray.repository.recipes import FILES, Tool, TransformersPlan, recipe_text, transformers_plan
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.repositories import SEVEN
from tests.tiny import make_checkpoint, random_tokens

pytestmark = pytest.mark.peers
ROOT = Path(__file__).parent.parent
#: Formats that ModelOpt rounds to without a GPU.
ANYWHERE = (FormatName.FP8, FormatName.INT4, FormatName.BF16)


class Made(NamedTuple):
    """A plan, and what a tool says that it made of it."""

    plan: TransformersPlan
    report: dict[str, Any]
    output: Path


def python_of(tool: Tool) -> Path:
    peers = Path(os.environ.get("PRISMAQUANT_PEERS", ROOT / ".venv-peers"))
    path = peers / str(tool) / "bin" / "python"
    if not path.is_file():
        pytest.fail(f"{path} does not exist: `make recipes` makes it and runs these tests", pytrace=False)
    return path


def made(
    directory: Path, tool: Tool, formats: Sequence[FormatName], *, modifier: str = "", still: bool = False
) -> Made:
    """A plan with these formats in turn, in a tool."""
    model = make_checkpoint(directory / "source", "llama_untied")
    source = Checkpoint(Store(model))
    layout = build_layout(source)[1]
    choice = {}
    for place, group in enumerate(layout.groups):
        fitting = formats_of(group, tuple(formats))
        choice[group.name] = fitting[place % len(fitting)]
    assert {*choice.values()} == {*formats}
    plan = transformers_plan(source, layout, choice)
    text = recipe_text(tool, plan, "a plan")
    if modifier:
        text = text.replace("QuantizationModifier:", f"{modifier}:")
    (directory / FILES[tool]).write_text(text)
    (directory / "tokens.json").write_text(json.dumps(random_tokens(4, 32).tolist()))
    program = ROOT / "tests" / "recipe_check" / f"with_{tool.name.lower()}.py"
    arguments = [model, directory / FILES[tool], directory / "tokens.json", directory / "output"]
    done = subprocess.run(
        [python_of(tool), program, *arguments, *(["--still"] if still else [])],
        capture_output=True,
        text=True,
        cwd=directory,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Made(plan, json.loads((directory / "output" / "linears.json").read_text()), directory / "output")


@pytest.mark.parametrize("modifier", ["QuantizationModifier", "GPTQModifier"])
def test_llm_compressor_gives_every_linear_the_scheme_of_the_plan(modifier: str, tmp_path: Path) -> None:
    plan, report, output = made(tmp_path, Tool.LLM_COMPRESSOR, SEVEN, modifier=modifier)
    assert report["linears"].keys() == {*plan.quantized, *plan.linears}
    for name, found in report["linears"].items():
        if name in plan.linears:
            assert found is None, name
            continue
        chosen, linear = plan.quantized[name]
        scheme = FORMATS[chosen].scheme
        assert scheme is not None
        for key, expected in zip(("weights", "input_activations"), scheme(linear.in_features), strict=True):
            # compressed-tensors forgets the dtype of zero points that symmetric schemes do not have.
            wanted = None if expected is None else {k: v for k, v in expected.items() if k != "zp_dtype"}
            assert (None if found[key] is None else {k: found[key][k] for k in wanted or {}}) == wanted, (name, key)
    assert report["finite"]
    assert (output / "model.safetensors").is_file()


def test_modelopt_gives_every_linear_the_quantizers_of_the_plan(tmp_path: Path) -> None:
    found = made(tmp_path, Tool.MODELOPT, SEVEN, still=True)
    have_the_quantizers_of_the_plan(found.plan, found.report)


def test_modelopt_calibrates_and_runs_what_needs_no_gpu(tmp_path: Path) -> None:
    found = made(tmp_path, Tool.MODELOPT, ANYWHERE)
    assert found.report["changed"]
    # Calibration turns a block or a token into an axis: the bits stay.
    for name, kinds in found.report["linears"].items():
        chosen = found.plan.quantized.get(name, (FormatName.BF16, None))[0]
        bits = {FormatName.FP8: ([4, 3], [4, 3]), FormatName.INT4: (4, None), FormatName.BF16: (None, None)}[chosen]
        assert tuple(kinds[kind] and kinds[kind]["num_bits"] for kind in ("weight", "input")) == bits, name


def have_the_quantizers_of_the_plan(plan: TransformersPlan, report: dict[str, Any]) -> None:
    assert report["finite"]
    assert report["elsewhere"] == []
    assert report["linears"].keys() == {*plan.quantized, *plan.linears}
    for name, kinds in report["linears"].items():
        expected: tuple[Any, Any] = (None, None)
        if name in plan.quantized:
            chosen, linear = plan.quantized[name]
            attributes = FORMATS[chosen].modelopt
            assert attributes is not None
            expected = attributes(linear.in_features)
        assert kinds["output"] is None
        for kind, wanted in zip(("weight", "input"), expected, strict=True):
            is_as_wanted(kinds[kind], wanted)


def is_as_wanted(found: dict[str, Any] | None, wanted: dict[str, Any] | None) -> None:
    if wanted is None or found is None:
        assert found is wanted
        return
    blocks = wanted.get("block_sizes")
    assert found == {
        "num_bits": wanted["num_bits"],
        "axis": wanted.get("axis"),
        "block_sizes": None if blocks is None else {str(key): value for key, value in blocks.items()},
        "dynamic": wanted.get("type") == "dynamic",
    }
