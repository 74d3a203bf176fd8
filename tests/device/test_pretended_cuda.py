"""Whole jobs on a CUDA device that is not there: no operation mixes devices, and files have the bytes of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.foreign_repositories import SCHEMES
from tests.ray_cluster import ROOT
from tests.tiny import ARCHITECTURES
from tests.tiny_families import FAMILIES

pytestmark = pytest.mark.device

#: How much prices may differ, by half of them at most: they are of gradients, which autograd computes by its own way on
#: a device. BF16 has 8 bits: 2⁻⁸ is a step.
_LAST_BITS = {"float32": 1e-6, "bfloat16": 1e-3}
#: They name the kind of device.
_NAMING = {"README.md", "prismaquant.json"}

_REFUSALS = """
import torch
from tests.pretended.device import pretended_cuda

def refusal(action):
    try:
        action()
    except (RuntimeError, TypeError) as error:
        return str(error)

with pretended_cuda() as ledger:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.device == torch.device("cuda", 0)
    found = [refusal(lambda: x + torch.ones(3)), refusal(lambda: x @ torch.ones(3, 1)), refusal(x.numpy)]
    assert (x + torch.tensor(1.0)).cpu().tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "0-dim tensors may mix"
    ledger.clear()
    y = (x.T.reshape(-1) * 2).sum()
    launches = sum(ledger.launches.values())
    waits = []
    for action in (
        lambda: None, lambda: y.item(), lambda: x[x > 1], lambda: x.cpu(), lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True), lambda: torch.equal(x, x),
    ):
        ledger.clear()
        action()
        waits.append(sorted(kind for kind, _ in ledger.waits))
    layer = torch.nn.Linear(3, 2).to("cuda")
    z = x.clone().requires_grad_()
    layer(z).square().sum().backward()
    expected = 2 * (x.cpu() @ layer.weight.detach().cpu().T + layer.bias.detach().cpu()) @ layer.weight.detach().cpu()
    assert torch.allclose(z.grad.cpu(), expected)
result = [found, launches, waits]
"""


def child(code: str) -> Any:
    """`result` of code in a Python of its own, because the guard must be loaded before torch.

    It ends without Python's finalization: autograd's thread of the device may still be releasing `Pretended` tensors,
    and a thread that asks a finalizing Python for its lock is unwound through C++, which aborts the process.
    """
    reply = "import json, os\nprint(json.dumps(result), flush=True)\nos._exit(0)"
    code = f"from tests.pretended.guard import load\nload()\n{code}\n{reply}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_device_refuses_what_cuda_refuses_and_counts_launches_and_waits() -> None:
    (added, multiplied, read), launches, waits = child(_REFUSALS)
    assert "aten.add: Expected all tensors to be on the same device, but found cuda:0 and cpu [(3,)]" in added
    assert "cpu [(3, 1)]" in multiplied
    assert "can't convert cuda:0" in read
    assert launches == 3, "the copy that reshape makes, the product, the sum"
    assert waits == [[], ["item"], ["mask"], ["copy to the host"], ["copy to the device"], [], ["equal"]]


@pytest.mark.parametrize(
    ("name", "dtype"),
    # bfloat16 is the default on GPUs. The last of the others hands on more than a hidden state.
    [
        *((name, "float32") for name in (*ARCHITECTURES, *FAMILIES, "gemma3n_text")),
        ("llama", "bfloat16"),
        ("qwen3_moe", "bfloat16"),
    ],
)
def test_a_whole_job_runs_on_the_device_and_has_the_bytes_of_the_cpu(tmp_path: Path, name: str, dtype: str) -> None:
    found = child(
        "from pathlib import Path\nfrom tests.pretended.job import both_jobs\n"
        f"result = both_jobs({name!r}, Path({str(tmp_path)!r}), {dtype!r})"
    )
    cpu, cuda = found["cpu"], found["cuda"]
    assert sum(found["launches"].values()) > 1000, "it did not run on the device"
    assert cuda["files"].keys() == cpu["files"].keys()
    assert {file for file in cpu["files"] if cuda["files"][file] != cpu["files"][file]} <= _NAMING
    # Gradients differ in their last bits; where that begins is not known. In bfloat16 these bits are larger, and of the
    # two blocks of a tiny model the ratio that tells how optimistic prices are makes more of them.
    ours, theirs = np.array(cpu["prices"]), np.array(cuda["prices"])
    apart = np.abs(theirs - ours)[ours > 0] / ours[ours > 0]
    assert np.median(apart) < _LAST_BITS[dtype]
    assert apart.max() < 16 * _LAST_BITS[dtype]
    assert theirs.sum() == pytest.approx(ours.sum(), rel=_LAST_BITS[dtype])
    if dtype == "float32":
        assert cuda["predicted_loss"] == pytest.approx(cpu["predicted_loss"], rel=_LAST_BITS[dtype])
    for measurement in ("measured", "evaluated"):
        for theirs, ours in zip(cuda[measurement], cpu[measurement], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-6)


def test_repositories_of_other_makers_are_evaluated_on_the_device_as_on_the_cpu(tmp_path: Path) -> None:
    found = child(
        "from pathlib import Path\nfrom tests.pretended.foreign import SCHEMES, evaluations\n"
        f"result = evaluations(list(SCHEMES), Path({str(tmp_path)!r}))"
    )
    assert len(found) == len(SCHEMES)
    for name, (cpu, cuda) in found.items():
        for ours, theirs in zip(cpu, cuda, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-6), name


def test_the_doctor_finds_nothing_wrong_with_the_device(tmp_path: Path) -> None:
    found = child(
        "from pathlib import Path\nfrom tests.pretended.job import doctored\n"
        f"result = doctored(Path({str(tmp_path)!r}))"
    )
    assert found["device"] == "a pretended card"
    assert found["failed"] == []
    assert {"memory", "nvfp4 weights", "NVFP4 activations"} <= set(found["checked"])
    assert found["copies"]
    assert found["deterministic"]
