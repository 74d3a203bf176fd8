"""What a command uses, with everything it starts: wall and CPU seconds, and peak memory. Linux only."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_INTERVAL = 0.25
_PATIENCE = 60.0
_PR_SET_CHILD_SUBREAPER = 36
_Known = dict[tuple[int, float], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """`wall` and `cpu` in seconds; `peak` in bytes, memory shared by processes counted once (PSS)."""

    wall: float
    cpu: float
    peak: int


def measured(command: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, its output in `log`.

    `wall` ends with the command. What it leaves behind (Ray ends its own processes) is waited for, and counted.

    CPU seconds are the larger of two sums, each of which lacks something. What the kernel says of processes that were
    waited for lacks those whose parent ignores SIGCHLD. What a look at every process four times a second says lacks
    what lives between two looks, and of the others the last quarter of a second. Memory is known from looks alone.

    Raises CalledProcessError, with the end of the output, when the command fails, and TimeoutError when something it
    left behind is still there after a minute. Whatever happens, nothing of it is left running.
    """
    # Processes whose parent has ended become ours, so none is lost sight of.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    others = {child.pid for child in psutil.Process().children(recursive=True)}
    seen: _Known = {}
    peak = 0
    before = _waited_for()
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
        try:
            while process.returncode is None:
                peak = max(peak, _look(_started(others), seen))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_INTERVAL)
            wall = time.perf_counter() - start
            while running := _started(others):
                peak = max(peak, _look(running, seen))
                _reap(running)
                if time.perf_counter() - start > wall + _PATIENCE:
                    raise TimeoutError(f"{command[0]} has ended, but not {', '.join(map(str, running))}")
                time.sleep(_INTERVAL)
        finally:
            while running := _started(others):
                for child in running:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                process.poll()
                _reap(running)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        print(tail, file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, [*map(str, command)], output=tail)
    return Usage(wall=wall, cpu=max(_waited_for() - before, sum(seen.values())), peak=peak)


def _started(others: set[int]) -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.pid not in others]


def _look(running: Sequence[psutil.Process], seen: _Known) -> int:
    """Note the CPU seconds of every process; bytes of memory they have together."""
    memory = 0
    for child in running:
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            seen[child.pid, child.create_time()] = times.user + times.system
            memory += _proportional(child.pid)
    return memory


def _waited_for() -> float:
    """CPU seconds of our children that have ended, and of theirs that they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _reap(running: Sequence[psutil.Process]) -> None:
    """Let go of those that have ended and are ours."""
    for child in running:
        with suppress(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)


def _proportional(pid: int) -> int:
    """Proportional set size; 0 for a process that is ending."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)
