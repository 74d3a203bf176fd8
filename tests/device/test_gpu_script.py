"""The script for a machine with one GPU and little else, tried without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.device.test_pretended_cuda import child
from tests.ray_cluster import ROOT

pytestmark = pytest.mark.device

STEPS = [
    "card", "checks", "bits", "rates", "dense forward", "dense backward", "exit", "experts forward", "experts backward",
]  # fmt: skip
# What comes with torch and transformers is there, nothing else of ours.
_BARE = """
import importlib.machinery, sys

MISSING = {"ray", "obstore", "pydantic", "pydantic_core", "compressed_tensors", "psutil", "matplotlib"}
find_spec = importlib.machinery.PathFinder.find_spec

def found(name, path=None, target=None):
    return None if name.partition(".")[0] in MISSING else find_spec(name, path, target)

importlib.machinery.PathFinder.find_spec = found
from benchmarks.gpu import main
sys.exit(main(sys.argv[1:]))
"""


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _BARE, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def check(steps: dict[str, Any]) -> None:
    assert list(steps) == STEPS
    assert [name for name, found in steps.items() if "failed" in found or "skipped" in found] == []
    assert all(each["passed"] for each in steps["checks"])
    for found in steps["bits"].values():
        assert found.pop("values") > 1000
        assert set(found.values()) == {0}
    assert set(steps["rates"]) >= {"TFLOP/s in BF16", "memory GB/s", "to the device GB/s", "us of a launch"}
    for layer in ("dense", "experts"):
        assert steps[f"{layer} forward"]["encoding"]["ms"] > 0
        assert steps[f"{layer} backward"]["backward with prices"]["bound_ms"] > 0
        assert set(steps[f"{layer} backward"]["again"].values()) == {0}, "a CPU gives the same bits"
    assert steps["exit"]["ms"] > 0


def test_every_step_runs_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    done = bare("--device", "cpu", "--small", "--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    check(json.loads((tmp_path / "gpu.json").read_text())["steps"])
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "dense loading", "dense forward", "dense forward with Hessians", "dense encoding",
        "dense loading and decoding", "dense backward with prices",
        "experts loading", "experts forward", "experts forward with Hessians", "experts encoding",
        "experts loading and decoding", "experts backward with prices", "exit",
    ]  # fmt: skip


def test_every_step_runs_on_the_device(tmp_path: Path) -> None:
    steps = child(
        "import torch, json\nfrom unittest.mock import patch\n"
        "from torch.nn.attention import SDPBackend, sdpa_kernel\n"
        "from benchmarks.gpu import main\nfrom tests.pretended.device import pretended_cuda\n"
        "available = patch.object(torch.cuda, 'is_available', lambda: True)\n"
        "with sdpa_kernel(SDPBackend.MATH), available, pretended_cuda() as ledger:\n"
        f"    code = main(['--small', '--output', {str(tmp_path / 'gpu.json')!r}])\n"
        f"steps = json.load(open({str(tmp_path / 'gpu.json')!r}))['steps']\n"
        "result = [code, sum(ledger.launches.values()), steps]"
    )
    code, launches, found = steps
    assert code == 0, found
    assert launches > 1000
    check(found)
    assert found["card"]["name"] == "a pretended card"
    assert found["dense forward"]["forward with Hessians"]["waits"] == 0


def test_without_a_gpu_it_says_so_and_a_budget_ends_it(tmp_path: Path) -> None:
    done = bare("--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("torch finds no GPU here; to try the script without one")
    done = bare("--device", "cpu", "--small", "--budget", "-1", "--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 0
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert list(steps) == STEPS
    assert all(found["skipped"].endswith("of -1") for found in steps.values())
