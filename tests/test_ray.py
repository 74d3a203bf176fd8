"""The job on real Ray actors: same bytes as without Ray, nothing left behind, a killed worker loses little."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.connect import connected, worker_count
from actors.events import Event, read_events
from actors.messages import WorkerSpec
from actors.schedule.recovery import Cause
from jobs import assemble, planning
from jobs.measure import Crew, ray_crew
from jobs.run import Run
from prismaquant_ray.config import load
from prismaquant_ray.errors import ResourceError
from tests.test_pipeline import configuration, digests, quantized
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "qwen3", "qwen3", layers=3)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, str]:
    config = configuration(tmp_path_factory.mktemp("expected"), source)
    quantized(config)
    return digests(config.store.output)


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


def test_two_jobs_at_once_do_not_disturb_each_other_and_write_the_same_bytes(
    tmp_path: Path, source: Path, expected: dict[str, str]
) -> None:
    before = set(Path("/tmp").glob("pq[!-]*"))
    jobs = {name: started(tmp_path / name, source, tmp_path / "home") for name in ("a", "b")}
    ended = {name: job.communicate(timeout=240) for name, job in jobs.items()}
    for name, job in jobs.items():
        out, err = ended[name]
        assert job.returncode == 0, err
        assert json.loads(out)["repository"]["repository"] == str(tmp_path / name / "repository")
        assert "forward 4/4" in err
        assert digests(tmp_path / name / "repository") == expected
    assert not (tmp_path / "home" / ".ray").exists()
    assert set(Path("/tmp").glob("pq[!-]*")) == before


def test_a_killed_worker_is_replaced_and_the_run_goes_on(
    tmp_path: Path, source: Path, expected: dict[str, str]
) -> None:
    configuration(tmp_path, source)
    config = load(tmp_path / "config.yaml", ["cluster.workers=2", "cluster.blocks_per_shard=1"])
    killed: list[int] = []

    @contextmanager
    def killing(spec: WorkerSpec, at_most: int) -> Iterator[Crew]:
        def kill(event: Event) -> None:
            """As the kernel would, once two shards are finished."""
            if event.kind == "worker":
                pids.append(event.payload["pid"])
            if event.kind == "shard":
                finished.append(event.payload["shard"])
                if len(finished) == 2:
                    killed.append(pids[-1])
                    os.kill(pids[-1], signal.SIGKILL)

        pids: list[int] = []
        finished: list[str] = []
        with ray_crew(spec, at_most) as crew:
            yield replace(crew, listeners=(*crew.listeners, kill))

    run = Run(config, open_workers=killing)
    run.measure()
    assemble.build(run, planning.allocate(run))
    assert killed
    assert digests(config.store.output) == expected
    lost = [event.payload for event in read_events(run.store) if event.kind == "lost"]
    assert [entry["cause"] for entry in lost] == [Cause.PROCESS]


def test_a_local_ray_is_on_loopback_and_leaves_nothing_in_the_environment(tmp_path: Path, source: Path) -> None:
    import ray

    from actors.connect import connected

    config = load_with(tmp_path, source, "cluster.workers=2")
    with connected(config.cluster):
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
    assert not ray.is_initialized()
    assert "RAY_AUTH_TOKEN" not in os.environ


def load_with(directory: Path, source: Path, *overrides: str) -> Any:
    configuration(directory, source)
    return load(directory / "config.yaml", overrides)


def test_a_running_cluster_is_joined_and_left_running(tmp_path: Path, source: Path, expected: dict[str, str]) -> None:
    directory = tempfile.mkdtemp(prefix="head", dir="/tmp")
    port = free_port()
    config = configuration(tmp_path, source)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    head = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--node-ip-address=127.0.0.2",
        f"--port={port}",
    ]
    head += ["--num-cpus=2", "--include-dashboard=false", "--object-store-memory=200000000", f"--temp-dir={directory}"]
    command = [sys.executable, "-m", "jobs", "quantize", str(tmp_path / "config.yaml")]
    command += ["--set", f"cluster.address=127.0.0.2:{port}", "--set", "cluster.workers=2"]
    try:
        subprocess.run(head, env=environment, check=True, capture_output=True, timeout=60)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert digests(config.store.output) == expected
        assert [process for process in psutil.process_iter(["cmdline"]) if _belongs(process, directory)]
    finally:
        for process in [process for process in psutil.process_iter(["cmdline"]) if _belongs(process, directory)]:
            process.kill()
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    """Outside the ports Ray gives to its workers."""
    for port in range(26379, 26479):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.2", port)) != 0:
                return port
    raise AssertionError("a hundred ports are taken")


def _belongs(process: Any, directory: str) -> bool:
    return any(directory in argument for argument in process.info["cmdline"] or ())


def test_an_address_without_ray_is_refused_at_once(tmp_path: Path, source: Path) -> None:
    for address in ("127.0.0.2:1", "nonsense"):
        config = load_with(tmp_path, source, f"cluster.address={address}")
        with pytest.raises(ResourceError, match=address), connected(config.cluster):
            pass
