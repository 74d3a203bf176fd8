"""Repositories of every family in real vLLM, on the CPU: schemes, weights and logits are what was asked for.

vLLM has an environment of its own, which `make vllm` makes; `tests/vllm_check` is the program that runs in it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.repositories import rewrite
from tests.served import make_repository

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parent.parent
FAMILIES = (
    "llama",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "gpt_oss",
)
VISION_FAMILIES = ("qwen3_5", "qwen3_5_moe")  # and a draft layer


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python of vLLM's environment."""
    path = Path(os.environ.get("PRISMAQUANT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not path.is_file():
        pytest.fail(f"{path} does not exist: `make vllm` makes vLLM's environment and runs these tests", pytrace=False)
    return path


def check(
    python: Path, repository: Path, copy: Path, report: Path, *, images: Sequence[Path] = (), draft: bool = False
) -> dict[str, Any]:
    """The report of tests/vllm_check, whether or not it is content."""
    command = [python, "-m", "tests.vllm_check", repository, "--reference", copy, "--json", report]
    options = [*(["--draft"] if draft else []), "--images", *images]
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert report.is_file(), run.stdout + run.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    assert run.returncode == bool(found["problems"]), run.stdout + run.stderr
    return found


def served_formats(report: dict[str, Any]) -> dict[str, str]:
    """Format of each of the checkpoint's modules, as vLLM serves it."""
    layers = report["layers"] + report.get("draft_layers", [])
    return {member: layer["format"] for layer in layers for member in layer["members"]}


def draw(path: Path, width: int, height: int) -> Path:
    picture = Image.new("RGB", (width, height))
    picture.putdata([(3 * x % 256, 5 * y % 256, (x * y) % 256) for y in range(height) for x in range(width)])
    picture.save(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_serves_what_was_chosen(
    family: str, vllm_python: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    repository, copy, expected = make_repository(tmp_path, family)
    sees = family in VISION_FAMILIES
    images = [draw(tmp_path / "tall.png", 64, 96), draw(tmp_path / "wide.png", 128, 64)] if sees else []
    report = check(vllm_python, repository, copy, tmp_path / "report.json", images=images, draft=sees)
    assert not report["problems"], "\n".join([*report["problems"], *report.get("failed", [])])
    served = served_formats(report)
    for module, name in expected.items():
        # Experts that stay BF16 may be packed: one module for all of a layer.
        packed = module.partition(".experts.")[0] + ".experts"
        assert served.get(module, served.get(packed)) == name, module
    quantized = [layer for layer in report["layers"] + report.get("draft_layers", []) if layer["format"] != "BF16"]
    assert quantized
    assert all(layer["different"] == 0 for layer in quantized), "a quantized layer was not compared"
    assert report["divergence"].keys() >= ({"text", "images", "draft"} if sees else {"text"})
    record_property("vLLM", f"{family}: {len(quantized)} quantized layers, {_divergences(report)}")


def _divergences(report: dict[str, Any]) -> str:
    return ", ".join(f"KL {kind} {values['mean']:.6f}" for kind, values in report["divergence"].items())


# The check itself ---------------------------------------------------------------------------------------------


def test_a_missing_tensor_of_one_member_is_noticed(vllm_python: Path, tmp_path: Path) -> None:
    repository, copy, expected = make_repository(tmp_path, "llama")
    module = next(module for module, name in expected.items() if name == "NVFP4")
    rewrite(repository, {f"{module}.input_global_scale": None})
    report = check(vllm_python, repository, copy, tmp_path / "report.json")
    assert report["problems"] == ["vLLM does not serve the repository"]
    assert any("input_global_scale was not initialized" in line for line in report["failed"])


def test_a_wrong_weight_is_noticed(vllm_python: Path, tmp_path: Path) -> None:
    repository, copy, expected = make_repository(tmp_path, "llama")
    module = next(module for module, name in expected.items() if name == "MXFP8")
    (holder,) = [path for path in copy.glob("*.safetensors") if f"{module}.weight" in load_file(path)]
    tensors = load_file(holder)
    tensors[f"{module}.weight"][0, 0] += 1
    save_file(tensors, holder, {"format": "pt"})
    report = check(vllm_python, repository, copy, tmp_path / "report.json")
    (wrong,) = [layer for layer in report["layers"] if layer["different"]]
    assert module in wrong["members"]
    assert wrong["different"] == 1
    assert any(problem.startswith("text: mean KL") for problem in report["problems"])
