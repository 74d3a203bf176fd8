"""A Ray cluster of several nodes on this machine, as a rented one behaves: nodes that vanish, workers to be killed.

Every node has a loopback address of its own. The cluster lives in the process that makes it, but that process does not
connect to it: drivers are processes of their own, as `ray job submit` would start them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parent.parent
#: Without these a lost node is noticed after a dozen seconds. They must be there when the head starts.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # Workers of a tiny model spend most of their life importing; let them do it before they are needed.
    "RAY_preload_python_modules": "torch,transformers",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
#: Ray shows what a worker is doing as its process title: the name that actors.pool gives to a call.
TITLE = re.compile(r"ray::prismaquant (\w+) (\w+)")


class RayCluster:
    """A head without CPUs and `nodes` nodes with one CPU each."""

    def __init__(self, nodes: int, environment: Mapping[str, str]) -> None:
        self.wanted = nodes
        self.saved: dict[str, str | None] = {}
        self.nodes: list[Any] = []
        self.directory = Path(tempfile.mkdtemp(prefix="pqc", dir="/tmp"))
        # Ray writes down the newest cluster of a machine; ours is nobody else's business.
        self.environment = {**QUICK, **environment, "RAY_TMPDIR": str(self.directory)}
        (self.directory / "ray").mkdir()
        self._address = 2

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def __enter__(self) -> RayCluster:
        self.saved = {key: os.environ.get(key) for key in self.environment}
        os.environ.update(self.environment)
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "node_ip_address": "127.0.0.2",
                "temp_dir": str(self.directory / "ray"),
                "object_store_memory": 100 * 2**20,
            },
        )
        self.restore()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cluster.shutdown()
        for key, value in self.saved.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value
        shutil.rmtree(self.directory, ignore_errors=True)

    def restore(self) -> None:
        """Add nodes until there are as many as wanted."""
        while len(self.nodes) < self.wanted:
            self._address += 1
            node = self.cluster.add_node(
                num_cpus=1, node_ip_address=f"127.0.0.{self._address}", object_store_memory=100 * 2**20
            )
            self.nodes.append(node)

    def remove_node_of(self, pid: int) -> None:
        """Kill everything on the node that runs a process, as a loss of power would."""
        node = next(node for node in self.nodes if pid in _below(node))
        self.nodes.remove(node)
        for process in _below(node):
            _kill(process)
        self.cluster.remove_node(node, allow_graceful=False)

    def worker(self, stage: str, kind: str, driver: subprocess.Popen[str]) -> int:
        """The process of a worker that is taking a step of this kind, as soon as there is one."""
        return wait_for(lambda: self._doing(stage, kind), driver)

    def _doing(self, stage: str, kind: str) -> int | None:
        for pid, title in self._titles():
            found = TITLE.match(title)
            if found and found.groups() == (stage, kind):
                return pid
        return None

    def wait_until_idle(self) -> None:
        """Until no actor is left: those of a killed driver end when Ray has noticed."""
        deadline = time.monotonic() + PATIENCE
        while any(title.startswith(("ray::ShardWorker", "ray::prismaquant")) for _, title in self._titles()):
            assert time.monotonic() < deadline, "actors of a killed driver live on"
            time.sleep(0.05)

    def _titles(self) -> Iterator[tuple[int, str]]:
        """Every process of the nodes, with what Ray calls it."""
        for node in self.nodes:
            for pid in _below(node):
                try:
                    yield pid, psutil.Process(pid).cmdline()[0]
                except (psutil.Error, IndexError):
                    continue


def start_driver(
    command: Sequence[str | Path], address: str, environment: Mapping[str, str], *overrides: str
) -> subprocess.Popen[str]:
    """`python -m jobs COMMAND …` on a cluster."""
    arguments = [sys.executable, "-m", "jobs", *map(str, command), "--json"]
    for override in (f"cluster.address={address}", *overrides):
        arguments += ["--set", override]
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, **QUICK, **environment, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _below(node: Any) -> set[int]:
    """Processes of a node: its own and everything below its raylet."""
    pids = set()
    for infos in node.all_processes.values():
        for info in infos:
            try:
                process = psutil.Process(info.process.pid)
                pids |= {process.pid, *(child.pid for child in process.children(recursive=True))}
            except psutil.NoSuchProcess:
                continue
    return pids


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
