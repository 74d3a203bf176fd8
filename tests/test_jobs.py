"""A submitted job on a plain `ray start` cluster whose nodes have the dependencies but not this project."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import status
from prismaquant_ray.storage.store import Store
from tests.ports import free_ports
from tests.test_pipeline import configuration, digests, quantized
from tests.tiny import make_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
_SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


@dataclass
class Head:
    """One node with a dashboard, which takes jobs."""

    python: Path
    environment: dict[str, str]
    address: str
    dashboard: str
    metrics: int

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-m", "ray.scripts.scripts", *arguments]
        environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)

    def submit(self, *arguments: object, wait: bool = True) -> subprocess.CompletedProcess[str]:
        options = ["--working-dir", ".", *([] if wait else ["--no-wait"]), "--submission-id", f"job-{time.time_ns()}"]
        return self.ray("job", "submit", *options, "--", "python", "-m", "jobs", *map(str, arguments))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with every dependency and without this project."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, with_pip=False, symlinks=True)
    # Editable installs are found by .pth files, which are not followed from here.
    site = next(directory.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    python = directory / "bin" / "python"
    found = subprocess.run(
        [python, "-c", "import ray, torch; import prismaquant_ray"], capture_output=True, text=True, cwd="/"
    )
    assert "No module named 'prismaquant_ray'" in found.stderr
    return python


@contextmanager
def started(python: Path, settings: Mapping[str, str]) -> Iterator[Head]:
    directory = tempfile.mkdtemp(prefix="pqj", dir="/tmp")
    port, dashboard, agent, client, metrics = free_ports(5)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
    environment = {**inherited, **_SETTINGS, "PATH": f"{python.parent}:{os.environ['PATH']}", **settings}
    head = Head(python, environment, f"127.0.0.2:{port}", f"http://127.0.0.1:{dashboard}", metrics)
    begun = head.ray(
        "start", "--head", "--node-ip-address=127.0.0.2", f"--port={port}", "--num-cpus=2", "--num-gpus=2",
        f"--temp-dir={directory}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", "--object-store-memory=200000000",
    )  # fmt: skip
    try:
        assert begun.returncode == 0, begun.stdout + begun.stderr
        yield head
    finally:
        _end(directory)


def _end(directory: str) -> None:
    """Never `ray stop`, which ends every Ray of the machine."""
    theirs = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(directory in argument for argument in process.info["cmdline"] or ())
    ]
    for process in theirs:
        process.kill()
    psutil.wait_procs(theirs, timeout=10)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def head(bare: Path) -> Iterator[Head]:
    with started(bare, {}) as found:
        yield found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "qwen3", "qwen3", layers=4)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, str]:
    config = configuration(tmp_path_factory.mktemp("expected"), source)
    quantized(config)
    return digests(config.store.output)


def prepared(directory: Path, source: Path, **settings: object) -> Path:
    """A configuration that joins the cluster it is submitted to."""
    configuration(directory, source)
    path = directory / "config.yaml"
    lines = {"address": "auto", "workers": 2, "device": "cpu", **settings}
    text = path.read_text().replace("address: local, workers: 1", ", ".join(f"{k}: {v}" for k, v in lines.items()))
    path.write_text(text)
    return path


def test_a_submitted_job_needs_no_project_on_the_nodes(
    head: Head, tmp_path: Path, source: Path, expected: dict[str, str]
) -> None:
    # The node says that it has GPUs, which Ray believes: workers are placed by them and compute where they can.
    job = head.submit("quantize", prepared(tmp_path, source, device="gpu"))
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    assert "forward 5/5" in job.stdout, "progress is in the job's log"
    # On so little work the first worker may be done before the second is ready.
    assert re.search(r"worker-\d is ready: cpu", job.stdout)
    assert "bits per quantizable parameter" in job.stdout
    assert digests(tmp_path / "repository") == expected


def test_exit_code_and_error_line_reach_the_job(head: Head, tmp_path: Path, source: Path) -> None:
    job = head.submit("quantize", prepared(tmp_path, source), "--set", "budget.bpp=3")
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


def wait(what: Callable[[], Any], seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it never came")


def test_a_stopped_job_ends_promptly_and_its_store_can_be_resumed(head: Head, tmp_path: Path, source: Path) -> None:
    config, run = prepared(tmp_path, source), tmp_path / "slow"
    submitted = head.submit("quantize", config, *slow(run), wait=False)
    name = next(word.strip("'") for word in submitted.stdout.split() if word.strip("'").startswith("job-"))
    wait(lambda: list(run.glob("forward/0000/*/boundary-*")))
    begun = time.monotonic()
    assert head.ray("job", "stop", name).returncode == 0
    wait(lambda: "stopped" in head.ray("job", "status", name).stdout.lower(), 30)
    assert time.monotonic() - begun < 60
    assert not list(run.glob("lease/*")), "the next driver need not wait"
    assert status.run(str(run))["state"].startswith("stopped")
    logs = head.ray("job", "logs", name).stdout
    assert "stopped; the same command continues" in logs
    again = head.submit("quantize", config, *slow(run))
    assert again.returncode == 0, again.stdout
    assert status.run(str(run))["state"] == "measured"


def test_metrics_are_where_prometheus_looks(head: Head, tmp_path: Path, source: Path) -> None:
    config, run = prepared(tmp_path, source), tmp_path / "slow"
    submitted = head.submit("quantize", config, *slow(run), wait=False)
    name = next(word.strip("'") for word in submitted.stdout.split() if word.strip("'").startswith("job-"))

    def page() -> list[str] | None:
        with urllib.request.urlopen(f"http://127.0.0.2:{head.metrics}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        lines = [line for line in text.splitlines() if f'run="{run}"' in line]
        return lines if any(line.startswith("ray_prismaquant_bytes_total") for line in lines) else None

    lines = wait(page)
    for metric in ("step_seconds_count", "tokens_total", "shards_left"):
        assert any(line.startswith(f"ray_prismaquant_{metric}") and 'stage="forward"' in line for line in lines)
    head.ray("job", "stop", name)


def direct(head: Head, config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A driver with the project installed, which brings no code: Ray's workers look where their driver does."""
    program = Path(sys.executable).parent / "prismaquant-ray"
    arguments = [str(program), "quantize", str(config), "--set", f"cluster.address={head.address}"]
    for override in overrides:
        arguments += ["--set", override]
    return subprocess.run(
        arguments, cwd="/", env={**os.environ, **_SETTINGS}, capture_output=True, text=True, timeout=120
    )


def refused(done: subprocess.CompletedProcess[str], message: str, code: int = 3) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "bug:"))]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_nodes_without_the_project_are_refused_by_name(head: Head, tmp_path: Path, source: Path) -> None:
    refused(direct(head, prepared(tmp_path, source)), "its node has no prismaquant-ray")


def test_what_the_cluster_lacks_is_refused_with_what_it_has(head: Head, tmp_path: Path, source: Path) -> None:
    done = direct(head, prepared(tmp_path, source, device="gpu", workers=3))
    refused(done, "3 workers of a GPU were asked for, 2 fit: the cluster has 2 GPUs and 2 CPUs on 1 nodes")
    done = direct(head, prepared(tmp_path / "c", source, labels="{pool: spot}"))
    refused(done, "on 0 nodes with labels pool=spot")


def test_a_cluster_that_wants_a_token_says_so(bare: Path, tmp_path: Path, source: Path) -> None:
    with started(bare, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}) as head:
        refused(direct(head, prepared(tmp_path, source)), "set RAY_AUTH_MODE=token")


def test_another_version_on_the_nodes_is_refused(bare: Path, tmp_path: Path, source: Path) -> None:
    other = tmp_path / "other"
    for package in ("prismaquant_ray", "actors", "jobs"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "prismaquant_ray" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "99.'))
    with started(bare, {"PYTHONPATH": str(other)}) as head:
        refused(direct(head, prepared(tmp_path, source)), "has prismaquant-ray 99.")


def test_ctrl_c_stops_a_local_run_in_order(tmp_path: Path, source: Path) -> None:
    configuration(tmp_path, source)
    command = [sys.executable, "-m", "jobs", "quantize", str(tmp_path / "config.yaml"), *slow(tmp_path / "slow")]
    driver = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True
    )
    wait(lambda: list((tmp_path / "slow").glob("forward/0000/*/boundary-*")))
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert err.splitlines()[-1] == "stopped; the same command continues"
    store = Store(tmp_path / "slow")
    assert not store.list("lease")
    assert json.loads(store.get("events.jsonl").decode().splitlines()[-1])["how"] == "stopped"
    assert not (tmp_path / "repository").exists()
