"""Timings of passes and workers, machines, and versions."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from platform import platform, python_version

from prismaquant_ray import __version__
from prismaquant_ray.attempts import PassAttempt, busy_shares, pass_attempts
from prismaquant_ray.events import Event, ObjectRepaired, RunBegan, ShardSteps, WorkerLost, WorkerReady
from prismaquant_ray.report.findings import Host, Machines, PassTiming, Timings, WorkerSpans

_PACKAGES = ("torch", "transformers", "compressed-tensors", "ray", "safetensors", "numpy")


def timings(events: Sequence[Event], planning_seconds: float) -> Timings:
    """Timings of every attempt at a pass with at least one step."""
    return Timings(
        attempts=sum(isinstance(event, RunBegan) for event in events),
        passes=[_pass(attempt) for attempt in pass_attempts(events) if attempt.work],
        planning_seconds=planning_seconds,
    )


def _pass(attempt: PassAttempt) -> PassTiming:
    seconds, moved = attempt.seconds, attempt.moved()
    return PassTiming(
        stage=attempt.began.stage,
        units=attempt.began.units,
        seconds=seconds,
        token_blocks_per_second=attempt.token_blocks / seconds if seconds > 0 else None,
        hop_bytes=moved["hop"],
        read_bytes=moved["read"],
        written_bytes=moved["written"],
        workers=_workers(attempt.work, attempt.began.at),
    )


def _workers(work: Sequence[ShardSteps], start: float) -> list[WorkerSpans]:
    busy = busy_shares(work)
    by_worker: dict[str, list[ShardSteps]] = {}
    for each in work:
        by_worker.setdefault(each.worker, []).append(each)
    found = []
    for worker, own in sorted(by_worker.items()):
        spans: dict[str, tuple[float, float]] = {}
        for each in own:
            begin, end = each.started - start, each.ended - start
            low, high = spans.get(each.shard, (begin, end))
            spans[each.shard] = min(low, begin), max(high, end)
        found.append(
            WorkerSpans(
                worker=worker,
                steps=sum(each.steps for each in own),
                seconds=sum(each.seconds for each in own),
                busy=busy.get(worker),
                peak_bytes=max(each.peak_bytes for each in own),
                spans=[(shard, round(begin, 2), round(end, 2)) for shard, (begin, end) in spans.items()],
            )
        )
    return found


def machines(events: Sequence[Event], peak_bytes: int) -> Machines:
    """The machines on which workers ran; `peak_bytes` is the peak memory of a worker."""
    workers: dict[tuple[str, str, str], set[str]] = {}
    host_bytes: dict[tuple[str, str, str], int] = {}
    for event in events:
        if isinstance(event, WorkerReady):
            key = (event.host, event.device, event.version)
            workers.setdefault(key, set()).add(event.worker)
            host_bytes[key] = event.host_bytes
    return Machines(
        hosts=[
            Host(host=host, device=device, version=code, host_bytes=host_bytes[host, device, code], workers=len(names))
            for (host, device, code), names in workers.items()
        ],
        lost=sum(isinstance(event, WorkerLost) for event in events),
        repairs=sum(isinstance(event, ObjectRepaired) for event in events),
        peak_worker_bytes=peak_bytes,
    )


def versions() -> dict[str, str | None]:
    """Versions on this machine; None for a package that is not installed."""
    found: dict[str, str | None] = {"prismaquant_ray": __version__, "python": python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {**found, "platform": platform()}
