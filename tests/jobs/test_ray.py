"""The job on real Ray actors: same bytes as without Ray, nothing left behind, a killed worker loses little."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.connect import connected, worker_count
from actors.messages import WorkerSpec
from actors.schedule.recovery import Cause
from jobs.pipeline.run import Run
from jobs.pipeline.workers import WorkerPool, ray_workers
from prismaquant_ray.config import load_config
from prismaquant_ray.errors import ResourceError
from prismaquant_ray.events import Event, WorkerLost, read_events
from tests.ray_head import SETTINGS, Head
from tests.runs import assembled, configuration, digests
from tests.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]


def started(directory: Path, source: Path, home: Path) -> subprocess.Popen[str]:
    """`python -m jobs quantize` in a process of its own, with a home of its own."""
    config = configuration(directory, source)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jobs",
            "quantize",
            str(config.store.run.parent / "config.yaml"),
            "--json",
            "--set",
            "cluster.workers=2",
        ],
        cwd=ROOT,
        env={**environment, "HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def private(job: subprocess.Popen[str]) -> list[Path]:
    """The directory of a job's own Ray."""
    return list(Path("/tmp").glob(f"pq{job.pid}-*"))


def test_two_jobs_at_once_do_not_disturb_each_other_and_write_the_same_bytes(
    tmp_path: Path, qwen3: Path, qwen3_digests: dict[str, str]
) -> None:
    jobs = {name: started(tmp_path / name, qwen3, tmp_path / "home") for name in ("a", "b")}
    for job in jobs.values():
        wait_for(partial(private, job), job)
    ended = {name: job.communicate(timeout=PATIENCE) for name, job in jobs.items()}
    for name, job in jobs.items():
        out, err = ended[name]
        assert job.returncode == 0, err
        assert json.loads(out)["repository"]["repository"] == str(tmp_path / name / "repository")
        assert "forward 5/5" in err
        assert digests(tmp_path / name / "repository") == qwen3_digests
        assert not private(job), "Ray's private directory is removed"
    assert not (tmp_path / "home" / ".ray").exists()


def test_a_killed_worker_is_replaced_and_the_run_goes_on(
    tmp_path: Path, qwen3: Path, qwen3_digests: dict[str, str]
) -> None:
    configuration(tmp_path, qwen3)
    config = load_config(tmp_path / "config.yaml", ["cluster.workers=2", "cluster.blocks_per_shard=1"])
    killed: list[int] = []

    @contextmanager
    def killing(spec: WorkerSpec, at_most: int) -> Iterator[WorkerPool]:
        def kill(event: Event) -> None:
            """As the kernel would, once two shards are finished."""
            if event.event == "worker":
                pids.append(event.pid)
            if event.event == "shard":
                finished.append(event.shard)
                if len(finished) == 2:
                    killed.append(pids[-1])
                    os.kill(pids[-1], signal.SIGKILL)

        pids: list[int] = []
        finished: list[str] = []
        with ray_workers(spec, at_most) as pool:
            yield replace(pool, listeners=(*pool.listeners, kill))

    run = Run(config, open_workers=killing)
    run.measure()
    assembled(run)
    assert killed
    assert digests(config.store.output) == qwen3_digests
    lost = [event for event in read_events(run.store) if isinstance(event, WorkerLost)]
    assert [event.cause for event in lost] == [Cause.PROCESS]


def test_a_local_ray_is_on_loopback_and_leaves_environment_and_handlers_as_they_were(
    tmp_path: Path, qwen3: Path
) -> None:
    import ray

    config = load_with(tmp_path, qwen3, "cluster.workers=2")
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    with connected(config.cluster):
        # The kernel must call this handler, whatever Python believes.
        signal.raise_signal(signal.SIGTERM)
        assert worker_count(config.cluster, 8) == 2
        assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
        listening = [
            connection.laddr.ip
            for process in [*psutil.Process().children(recursive=True), psutil.Process()]
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) > 5
        assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert caught == [signal.SIGTERM] * 2
    assert not ray.is_initialized()
    assert "RAY_AUTH_TOKEN" not in os.environ


def load_with(directory: Path, source: Path, *overrides: str) -> Any:
    configuration(directory, source)
    return load_config(directory / "config.yaml", overrides)


def test_a_running_cluster_is_joined_and_left_running(
    tmp_path: Path, head: Head, qwen3: Path, qwen3_digests: dict[str, str]
) -> None:
    config = configuration(tmp_path, qwen3)
    command = [sys.executable, "-m", "jobs", "quantize", str(tmp_path / "config.yaml")]
    command += ["--set", f"cluster.address={head.address}", "--set", "cluster.workers=2", "--set", "cluster.device=cpu"]
    environment = {**os.environ, **SETTINGS}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert digests(config.store.output) == qwen3_digests
    status = head.ray("status", "--address", head.address)
    assert status.returncode == 0, status.stderr


def test_the_doctor_examines_a_running_cluster_and_a_gpu_that_torch_cannot_use_fails(
    tmp_path: Path, head: Head, qwen3: Path
) -> None:
    configuration(tmp_path, qwen3)
    command = [sys.executable, "-m", "jobs", "doctor", str(tmp_path / "config.yaml"), "--json"]
    command += ["--set", f"cluster.address={head.address}", "--set", "cluster.workers=2"]
    codes, checks = [], []
    for device in ("cpu", "gpu"):
        done = subprocess.run(
            [*command, "--set", f"cluster.device={device}"],
            cwd=ROOT,
            env={**os.environ, **SETTINGS},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        codes.append(done.returncode)
        workers = json.loads(done.stdout)["workers"]
        checks.append([(check["passed"], check["found"]) for worker in workers for check in worker["checks"]])
    assert codes == [0, 3]
    assert len(checks[0]) > 8
    assert all(passed for passed, _ in checks[0])
    assert [passed for passed, _ in checks[1]] == [False, False]
    assert "has a GPU of" in checks[1][0][1]
    assert "cannot use" in checks[1][0][1]


def test_an_address_without_ray_is_refused_at_once(tmp_path: Path, qwen3: Path) -> None:
    for address in ("127.0.0.2:1", "nonsense"):
        config = load_with(tmp_path, qwen3, f"cluster.address={address}")
        with pytest.raises(ResourceError, match=address), connected(config.cluster):
            pass
