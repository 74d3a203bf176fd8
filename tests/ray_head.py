"""A plain `ray start` cluster of one node on this machine, which takes jobs; its Python need not have this project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ports import free_ports
from tests.waiting import PATIENCE

ROOT = Path(__file__).parent.parent
#: What a driver on such a cluster needs.
SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


@dataclass
class Head:
    """One node with a dashboard, which takes jobs."""

    python: Path
    environment: dict[str, str]
    address: str
    dashboard: str
    metrics: int

    def ray(self, *arguments: str, checkout: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-m", "ray.scripts.scripts", *arguments]
        environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard}
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=PATIENCE)

    def submit(self, *arguments: object, wait: bool = True, checkout: Path = ROOT) -> subprocess.CompletedProcess[str]:
        options = ["--working-dir", ".", *([] if wait else ["--no-wait"]), "--submission-id", f"job-{time.time_ns()}"]
        return self.ray(
            "job", "submit", *options, "--", "python", "-m", "jobs", *map(str, arguments), checkout=checkout
        )


def make_bare(directory: Path) -> Path:
    """A Python with every dependency and without this project."""
    venv.create(directory, with_pip=False, symlinks=True)
    # Editable installs are found by .pth files, which are not followed from here.
    site = next(directory.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    python = directory / "bin" / "python"
    found = subprocess.run(
        [python, "-c", "import ray, torch; import prismaquant_ray"],
        capture_output=True, text=True, cwd="/",
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
    )  # fmt: skip
    assert "No module named 'prismaquant_ray'" in found.stderr
    return python


@contextmanager
def started(python: Path, settings: Mapping[str, str]) -> Iterator[Head]:
    directory = tempfile.mkdtemp(prefix="pqj", dir="/tmp")
    port, dashboard, agent, client, metrics = free_ports(5)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
    environment = {**inherited, **SETTINGS, "PATH": f"{python.parent}:{os.environ['PATH']}", **settings}
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
