"""Repositories in real vLLM, on the CPU: schemes, weights and logits are what was asked for.

vLLM has an environment of its own, which `make vllm` makes; `tests/vllm_check` is the program that runs in it. Starting
it takes longer than serving a model, so all that are asked for are made first and served by one process.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.repositories import rewrite
from tests.served import ARCHITECTURES, CACHED, FAMILIES, OTHERS, VISION_FAMILIES, make_repository

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parent.parent
#: Behind a family's name: with an FP8 KV cache.
WITH_CACHE = " with an FP8 cache"


class Served(NamedTuple):
    """The report of tests/vllm_check, and the format of every module that could be quantized."""

    report: dict[str, Any]
    expected: Mapping[str, str]


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python of vLLM's environment."""
    path = Path(os.environ.get("PRISMAQUANT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not path.is_file():
        pytest.fail(f"{path} does not exist: `make vllm` makes vLLM's environment and runs these tests", pytrace=False)
    return path


@pytest.fixture(scope="session")
def served(
    request: pytest.FixtureRequest, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Served]:
    """What vLLM made of a model, by its name, of those that the selected tests name."""
    marks = [mark for item in request.session.items for mark in item.iter_markers("serves")]
    names = dict.fromkeys(name for mark in marks for name in mark.args)
    directory = tmp_path_factory.mktemp("served")
    jobs, expected = [], {}
    for name in names:
        family, cached = name.partition(" ")[0], name.endswith(WITH_CACHE)
        made = family if cached else name
        repository, copy, expected[name] = make_repository(directory / name, made, cached=cached)
        if name in FAULTS:
            FAULTS[name](repository, copy, expected[name])
        sees = family in VISION_FAMILIES
        images = (
            [draw(directory / name / "tall.png", 64, 96), draw(directory / name / "wide.png", 128, 64)] if sees else []
        )
        jobs.append([str(repository), str(copy), str(directory / f"{name}.json"), [*map(str, images)], sees])
    run = subprocess.run(
        [vllm_python, "-m", "tests.vllm_check"], input=json.dumps(jobs), cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return lambda name: Served(json.loads((directory / f"{name}.json").read_text()), expected[name])


def draw(path: Path, width: int, height: int) -> Path:
    picture = Image.new("RGB", (width, height))
    picture.putdata([(3 * x % 256, 5 * y % 256, (x * y) % 256) for y in range(height) for x in range(width)])
    picture.save(path)
    return path


def served_formats(report: dict[str, Any]) -> dict[str, str]:
    """Format of each of the checkpoint's modules, as vLLM serves it."""
    layers = report["layers"] + report.get("draft_layers", [])
    return {member: layer["format"] for layer in layers for member in layer["members"]}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.serves(name)) for name in (*FAMILIES, *OTHERS, *ARCHITECTURES)]
)
def test_vllm_serves_what_was_chosen(
    name: str, served: Callable[[str], Served], record_property: Callable[[str, object], None]
) -> None:
    report, expected = served(name)
    assert not report["problems"], "\n".join([*report["problems"], *report.get("failed", [])])
    formats = served_formats(report)
    for module, format_name in expected.items():
        # Experts that stay BF16 may be packed: one module for all of a layer.
        packed = module.partition(".experts.")[0] + ".experts"
        assert formats.get(module, formats.get(packed)) == format_name, module
    quantized = [layer for layer in report["layers"] + report.get("draft_layers", []) if layer["format"] != "BF16"]
    assert quantized
    assert all(layer["different"] == 0 for layer in quantized), "a quantized layer was not compared"
    assert report["divergence"].keys() >= ({"text", "images", "draft"} if name in VISION_FAMILIES else {"text"})
    record_property("vLLM", f"{name}: {len(quantized)} quantized layers, {_divergences(report)}")


def _divergences(report: dict[str, Any]) -> str:
    return ", ".join(f"KL {kind} {values['mean']:.6f}" for kind, values in report["divergence"].items())


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.serves(name + WITH_CACHE)) for name in CACHED])
def test_vllm_caches_in_fp8_under_the_scales_of_the_repository(
    family: str, served: Callable[[str], Served], record_property: Callable[[str, object], None]
) -> None:
    report, _ = served(family + WITH_CACHE)
    # The copy has the same cache: vLLM's CPU build rounds towards zero, but in both alike.
    assert not report["problems"], "\n".join([*report["problems"], *report.get("failed", [])])
    caches = report["caches"] + report.get("draft_caches", [])
    assert caches
    assert {cache["type"] for cache in caches} == {"fp8"}
    found = sorted(tuple(cache["scales"]) for cache in caches)
    assert found == sorted(stored_scales(Path(report["repository"])))
    assert all(scale not in (0.0, 1.0) for pair in found for scale in pair)
    record_property("vLLM", f"{family}: {len(caches)} caches in FP8, {_divergences(report)}")


def stored_scales(repository: Path) -> list[tuple[float, float]]:
    """Scales of keys and of values by attention."""
    tensors: dict[str, Tensor] = {}
    for path in repository.glob("*.safetensors"):
        tensors |= load_file(path)
    keys = [name for name in tensors if name.endswith(".k_scale")]
    return [(float(tensors[name]), float(tensors[name.removesuffix("k_scale") + "v_scale"])) for name in keys]


# The check itself ---------------------------------------------------------------------------------------------


def _lose_a_tensor(repository: Path, _: Path, expected: Mapping[str, str]) -> None:
    module = next(module for module, name in expected.items() if name == "NVFP4")
    rewrite(repository, {f"{module}.input_global_scale": None})


def _change_a_weight(_: Path, copy: Path, expected: Mapping[str, str]) -> None:
    weight = f"{next(module for module, name in expected.items() if name == 'MXFP8')}.weight"
    (holder,) = [path for path in copy.glob("*.safetensors") if weight in load_file(path)]
    tensors = load_file(holder)
    tensors[weight][0, 0] += 1
    save_file(tensors, holder, {"format": "pt"})


#: Models with a fault, after the family's name.
FAULTS: Mapping[str, Callable[[Path, Path, Mapping[str, str]], None]] = {
    "llama without a tensor": _lose_a_tensor,
    "llama with another weight": _change_a_weight,
}


@pytest.mark.serves("llama without a tensor")
def test_a_missing_tensor_of_one_member_is_noticed(served: Callable[[str], Served]) -> None:
    report = served("llama without a tensor").report
    assert report["problems"] == ["vLLM does not serve the repository"]
    assert any("input_global_scale was not initialized" in line for line in report["failed"])


@pytest.mark.serves("llama with another weight")
def test_a_wrong_weight_is_noticed(served: Callable[[str], Served]) -> None:
    report, expected = served("llama with another weight")
    module = next(module for module, name in expected.items() if name == "MXFP8")
    (wrong,) = [layer for layer in report["layers"] if layer["different"]]
    assert module in wrong["members"]
    assert wrong["different"] == 1
    assert any(problem.startswith("text: mean KL") for problem in report["problems"])
