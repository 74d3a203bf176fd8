"""A submitted job on a plain `ray start` cluster whose nodes have the dependencies but not this project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml

from jobs.commands import status
from tests.ray_head import SETTINGS, Head, started
from tests.runs import configuration, digests
from tests.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]


def prepared(directory: Path, source: Path, **settings: object) -> Path:
    """A configuration that joins the cluster it is submitted to."""
    configuration(directory, source)
    path = directory / "config.yaml"
    lines = {"address": "auto", "workers": 2, "device": "cpu", **settings}
    body = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(body | {"cluster": lines}))
    return path


def test_a_submitted_job_needs_no_project_on_the_nodes(
    head: Head, tmp_path: Path, qwen3: Path, qwen3_digests: dict[str, str]
) -> None:
    job = head.submit("quantize", prepared(tmp_path, qwen3))
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    assert "forward 5/5" in job.stdout, "progress is in the job's log"
    # On so little work the first worker may be done before the second is ready.
    assert re.search(r"worker-\d is ready: cpu", job.stdout)
    assert "bits per quantizable parameter" in job.stdout
    assert digests(tmp_path / "repository") == qwen3_digests


def test_a_checkout_that_holds_results_is_submitted_without_them(
    head: Head, tmp_path: Path, qwen3: Path, qwen3_digests: dict[str, str]
) -> None:
    checkout = tmp_path / "checkout"
    for package in ("prismaquant_ray", "actors", "jobs", "configs"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout / name)
    # Ray refuses more than 512 MiB; nobody's .gitignore knows these names.
    large = (
        "models/qwen3/model-00001-of-00001.safetensors",
        "mine/run/forward/0000/x/boundary-0.bin",
        "env-2/lib/torch.so",
    )
    for name in (*large, "configs/qwen3/model.safetensors", "backup.tar"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        with (checkout / name).open("wb") as file:
            file.truncate(600 * 2**20)
    (checkout / "models/qwen3/config.json").write_text("{}")
    # Settings and texts beside the code are what a job reads.
    prepared(tmp_path / "job", qwen3)
    settings = yaml.safe_load((tmp_path / "job/config.yaml").read_text())
    settings["calibration"]["text"] = "text.txt"
    shutil.copy(tmp_path / "job/text.txt", checkout / "text.txt")
    (checkout / "mine.yaml").write_text(yaml.safe_dump(settings))
    job = head.submit("quantize", "mine.yaml", checkout=checkout)
    assert job.returncode == 0, job.stdout + job.stderr
    assert digests(tmp_path / "job/repository") == qwen3_digests
    sent = packaged(checkout)
    assert {name.partition("/")[0] for name in sent} == {
        "prismaquant_ray", "actors", "jobs", "configs", "mine.yaml", "text.txt"
    }  # fmt: skip
    assert sum(sent.values()) < 10 * 2**20


def packaged(checkout: Path) -> dict[str, int]:
    """What Ray packs of a checkout: files with their bytes."""
    from ray._private.runtime_env.packaging import create_package

    package = checkout.parent / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as packed:
        return {entry.filename: entry.file_size for entry in packed.infolist()}


def test_exit_code_and_error_line_reach_the_job(head: Head, tmp_path: Path, qwen3: Path) -> None:
    job = head.submit("quantize", prepared(tmp_path, qwen3), "--set", "budget.bpp=3")
    assert job.returncode != 0
    name = next(word.strip("'") for word in job.stdout.split() if word.strip("'").startswith("job-"))
    state = head.ray("job", "status", name)
    assert "failed with exit code 2" in state.stdout
    logs = head.ray("job", "logs", name).stdout
    last = [line for line in logs.splitlines() if line.strip()]
    assert any(line.startswith("error: budget 3 bits per parameter is below the smallest plan") for line in last[-3:])
    assert "Traceback" not in logs
    assert not (tmp_path / "run").exists()


def slow(path: Path) -> tuple[str, ...]:
    """Overrides of a run that lasts long enough to be stopped."""
    return ("--set", "calibration.sequences=96", "--set", "calibration.microbatch=1", "--set", f"store.run={path}")


def test_a_stopped_job_ends_promptly_and_its_store_can_be_resumed(head: Head, tmp_path: Path, qwen3: Path) -> None:
    config, run = prepared(tmp_path, qwen3), tmp_path / "slow"
    submitted = head.submit("quantize", config, *slow(run), wait=False)
    name = next(word.strip("'") for word in submitted.stdout.split() if word.strip("'").startswith("job-"))
    wait_for(lambda: list(run.glob("forward/0000/*/boundary-*")))
    assert head.ray("job", "stop", name).returncode == 0
    wait_for(lambda: "stopped" in head.ray("job", "status", name).stdout.lower())
    # Ray kills a job that does not end within seconds: that would leave a lease, and could say nothing.
    assert not list(run.glob("lease/*")), "the next driver need not wait"
    assert status.run(str(run)).state.startswith("stopped")
    logs = head.ray("job", "logs", name).stdout
    assert "stopped; the same command continues" in logs
    again = head.submit("quantize", config, *slow(run))
    assert again.returncode == 0, again.stdout
    assert status.run(str(run)).state == "measured"


def test_metrics_are_where_prometheus_looks(head: Head, tmp_path: Path, qwen3: Path) -> None:
    config, run = prepared(tmp_path, qwen3), tmp_path / "slow"
    submitted = head.submit("quantize", config, *slow(run), wait=False)
    name = next(word.strip("'") for word in submitted.stdout.split() if word.strip("'").startswith("job-"))

    def missing() -> set[str]:
        with urllib.request.urlopen(f"http://127.0.0.2:{head.metrics}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        lines = [line for line in text.splitlines() if f'run="{run}"' in line and 'stage="forward"' in line]
        names = ("bytes_total", "step_seconds_count", "tokens_total", "shards_left")
        return {name for name in names if not any(line.startswith(f"ray_prismaquant_{name}") for line in lines)}

    # Ray exports what it has now and then, and a shard that is done comes long after the first step.
    wait_for(lambda: not missing(), pause=0.1)
    head.ray("job", "stop", name)


def direct(head: Head, config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A driver with the project installed, which brings no code: Ray's workers look where their driver does."""
    program = Path(sys.executable).parent / "prismaquant-ray"
    arguments = [str(program), "quantize", str(config), "--set", f"cluster.address={head.address}"]
    for override in overrides:
        arguments += ["--set", override]
    return subprocess.run(
        arguments, cwd="/", env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=PATIENCE
    )


def refused(done: subprocess.CompletedProcess[str], message: str, code: int = 3) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "bug:"))]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_nodes_without_the_project_are_refused_by_name(head: Head, tmp_path: Path, qwen3: Path) -> None:
    refused(direct(head, prepared(tmp_path, qwen3)), "its node has no prismaquant-ray")


def test_what_the_cluster_lacks_is_refused_with_what_it_has(head: Head, tmp_path: Path, qwen3: Path) -> None:
    done = direct(head, prepared(tmp_path, qwen3, device="gpu", workers=3))
    refused(done, "3 workers of a GPU were asked for, 2 fit: the cluster has 2 GPUs and 2 CPUs on 1 nodes")
    done = direct(head, prepared(tmp_path / "c", qwen3, labels={"pool": "spot"}))
    refused(done, "on 0 nodes with labels pool=spot")


def test_a_cluster_that_wants_a_token_says_so(bare: Path, tmp_path: Path, qwen3: Path) -> None:
    with started(bare, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}) as head:
        refused(direct(head, prepared(tmp_path, qwen3)), "set RAY_AUTH_MODE=token")


def test_another_version_on_the_nodes_is_refused(bare: Path, tmp_path: Path, qwen3: Path) -> None:
    other = tmp_path / "other"
    for package in ("prismaquant_ray", "actors", "jobs"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "prismaquant_ray" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "99.'))
    with started(bare, {"PYTHONPATH": str(other)}) as head:
        refused(direct(head, prepared(tmp_path, qwen3)), "has prismaquant-ray 99.")
