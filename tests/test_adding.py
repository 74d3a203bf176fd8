"""The pages on adding a format and a model, followed to the letter in a copy of the packages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import OlmoeConfig, OlmoeForCausalLM

from prismaquant_ray.families import family_of
from prismaquant_ray.families.base import ROUTER
from prismaquant_ray.formats import FormatName
from tests import tiny_families
from tests.test_docs import blocks
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[1]
PACKAGES = ("prismaquant_ray", "actors", "jobs", "tests")


class Copy:
    """The packages in a directory of their own, to be changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for package in PACKAGES:
            shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "vllm_check"))

    def insert(self, file: str, after: str, text: str) -> None:
        """Put text behind the only place that matches a pattern."""
        path = self.root / file
        changed, places = re.subn(after, lambda match: match[0] + text, path.read_text(), flags=re.MULTILINE)
        assert places == 1, (file, after)
        path.write_text(changed)

    def run(self, *arguments: object) -> str:
        """What Python says on its standard output, with these packages in front."""
        done = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)], cwd=self.root, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout

    def whole_way(self, directory: Path, source: Path, bpp: float, *formats: str) -> dict[str, Any]:
        """What every command says of a run, by command."""
        found: dict[str, Any] = json.loads(
            self.run("tests.whole_way", directory, source, bpp, *formats).splitlines()[-1]
        )
        return found


@pytest.fixture
def copied(tmp_path: Path) -> Copy:
    """A copy of the packages that the test may change."""
    return Copy(tmp_path / "copy")


def code_of(page: str) -> list[str]:
    """The Python blocks of a page."""
    return [body for language, body in blocks(ROOT / "docs" / page) if language == "python"]


@pytest.fixture
def with_int2(copied: Copy) -> Copy:
    """After the steps of the page on formats."""
    member, file = code_of("adding-a-format.md")
    assert "INT2" not in FormatName.__members__
    copied.insert("prismaquant_ray/formats/__init__.py", r"(?<=class FormatName).*\n.*\n\n", f"    {member}")
    (copied.root / "prismaquant_ray/formats/int2.py").write_text(file)
    return copied


@pytest.mark.slow
def test_a_format_is_added_by_a_file_and_a_name(with_int2: Copy, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    found = with_int2.whole_way(tmp_path, source, 3.5, "INT2", "NVFP4", "BF16")
    assert found["formats"]["formats"][0]["format"] == "INT2"
    assert found["inspect"]["groups_per_format"] == {"INT2": 8, "NVFP4": 8, "BF16": 8}
    groups = found["quantize"]["groups"]
    assert groups["INT2"] > 0
    assert {entry["format"] for entry in found["explain"]["alternatives"]} == {"INT2", "NVFP4", "BF16"}
    assert found["verify"]["problems"] == []
    assert found["verify"]["linears"]["INT2"] >= groups["INT2"]
    assert found["dequantize"]["modules"] == {
        name: count for name, count in found["verify"]["linears"].items() if name != "BF16" and count
    }
    report = tmp_path / "run/report"
    html, figures = (report / "report.html").read_text(), json.loads((report / "report.json").read_text())
    assert {"#e6f5b0", "#1f2a00"} <= set(re.findall(r"#[0-9a-f]{6}", html))
    assert {"name": "INT2", "letter": "2"}.items() <= figures["formats"][0].items()
    assert figures["plans"][0]["choice"].count("2") == groups["INT2"]


@pytest.mark.slow
def test_the_example_format_passes_the_tests_that_need_no_change(with_int2: Copy) -> None:
    said = with_int2.run("pytest", "tests/formats/test_formats.py", "-k", "INT2 or int2", "-p", "no:cacheprovider")
    assert int(re.search(r"(\d+) passed", said)[1]) > 10


@pytest.mark.slow
def test_a_family_is_added_by_a_file_and_an_entry(
    copied: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert family_of("OlmoeForCausalLM") is None
    monkeypatch.setitem(tiny_families._CLASSES, "olmoe", (OlmoeConfig, OlmoeForCausalLM))
    sizes = {"num_hidden_layers": 2, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny_families._OWN, "olmoe", sizes)
    source = tiny_families.make_family(tmp_path / "source", "olmoe")

    (file,) = code_of("adding-a-model.md")
    assert "import `olmoe`, and put `olmoe.FAMILY` into `FAMILIES`" in (ROOT / "docs/adding-a-model.md").read_text()
    registry = "prismaquant_ray/families/__init__.py"
    (copied.root / "prismaquant_ray/families/olmoe.py").write_text(file)
    copied.insert(registry, r"^from prismaquant_ray.families import ", "olmoe, ")
    copied.insert(registry, r"^FAMILIES.*\n", "    olmoe.FAMILY,\n")
    found = copied.whole_way(tmp_path, source, 6.0, "NVFP4", "FP8", "BF16")
    assert found["inspect"]["family"] == "olmoe"
    assert found["inspect"]["guesses"] == []
    assert found["verify"]["problems"] == []
    layout = json.loads((tmp_path / "run/layout.json").read_text())["facts"]
    assert {group["name"] for block in layout["blocks"] for group in block["groups"]} == {
        f"model.layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.experts")
    }
    kept = {name: reason for name, reason in layout["ignored"].items() if "layers" in name}
    assert kept == {f"model.layers.{layer}.mlp.gate": ROUTER for layer in (0, 1)}
