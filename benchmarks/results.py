"""Where figures go: one JSON file a benchmark, with what is needed to make it again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from actors.pool import WORKER_ENVIRONMENT
from prismaquant_ray.events import Event, read_events
from prismaquant_ray.storage.store import Store

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "compressed-tensors", "numpy", "ray")


def machine() -> str:
    """Processor, cores and memory."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU"


def log_of(run: Path) -> list[Event]:
    """The events of a run, from its store."""
    return read_events(Store(run, create=False))


def as_a_worker() -> None:
    """Start this process again with the environment that a run gives its workers: allocators read it at their start."""
    wanted = {**os.environ, **WORKER_ENVIRONMENT}
    if wanted != dict(os.environ):
        os.execve(sys.executable, sys.orig_argv, wanted)  # noqa: S606 - this very command


def used() -> dict[str, float]:
    """CPU seconds of this process and those it waited for, and the largest peak of one of them in MB."""
    whole = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in whole)
    return {"cpu": round(cpu, 1), "peak_mb": round(max(each.ru_maxrss for each in whole) / 1000, 1)}


def save(name: str, figures: Mapping[str, Any], directory: Path = RESULTS) -> Path:
    """Write NAME.json, with what making it has used, and say so."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    header = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join([".venv/bin/python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": machine(),
        "used": used(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    path.write_text(json.dumps({**header, **figures}, indent=1) + "\n")
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path
