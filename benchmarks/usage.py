"""What a command uses, with everything it starts: wall and CPU seconds, and peak memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_INTERVAL = 0.25
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """`wall` and `cpu` in seconds; `peak` in bytes, memory shared by processes counted once (PSS)."""

    wall: float
    cpu: float
    peak: int


def measured(command: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end; CalledProcessError with the end of its output when it fails.

    Processes are asked four times a second, also those whose parent has ended (Ray's), so each is known to within a
    quarter of a second of its end.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    here = psutil.Process()
    others = {child.pid for child in here.children(recursive=True)}
    cpu: dict[tuple[int, float], float] = {}
    peak = 0
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command)], stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        wall = 0.0
        while True:
            ended = process.poll() is not None
            wall = wall or (time.perf_counter() - start if ended else 0.0)
            running = [child for child in here.children(recursive=True) if child.pid not in others]
            memory = 0
            for child in running:
                try:
                    times = child.cpu_times()
                    cpu[child.pid, child.create_time()] = times.user + times.system
                    memory += _proportional(child.pid)
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, memory)
            # What a command leaves behind (Ray ends its own processes) is waited for, and counted.
            if ended and not running:
                break
            for child in running:
                if child.pid != process.pid:
                    _reap(child.pid)
            time.sleep(_INTERVAL)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        print(tail, file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, [*map(str, command)])
    return Usage(wall=wall, cpu=sum(cpu.values()), peak=peak)


def _reap(pid: int) -> None:
    """Let go of a process that has ended and became ours."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _proportional(pid: int) -> int:
    """Proportional set size; 0 for a process that is ending."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)
