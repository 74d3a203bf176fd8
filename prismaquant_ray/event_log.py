"""The log of a run: who writes it, and how the steps of a shard become one line.

Only the driver that holds the run's lease writes it. Object stores cannot append, so the whole object is rewritten,
less often as it grows. A model of 2,000 blocks takes some hundred thousand steps: they are kept one by one only while
their shard is run, so the log grows with the shards.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence

from prismaquant_ray.events import (
    Event,
    Notice,
    PassBegan,
    RunBegan,
    RunEnded,
    ShardDone,
    ShardSteps,
    ShardYielded,
    StepDone,
    Waiting,
    WorkerLost,
    read_events,
)
from prismaquant_ray.records import EVENTS
from prismaquant_ray.storage.store import Store

# Seconds between two puts, and how many more per megabyte of log.
_INTERVAL = 2.0
_INTERVAL_PER_MEGABYTE = 5.0


class EventLog:
    """The log of a run; continues the one that is there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._text = bytearray()
        self._running = RunningSteps()
        self._waiting: Waiting | None = None
        #: The most memory a worker has taken, over all attempts.
        self.peak_bytes: int = 0
        for event in read_events(store):
            self._add(event)
        self._write(self._running.rest())
        self._written = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Add an event, unless it is a notice; it reaches the store within seconds."""
        if isinstance(event, Notice):
            return
        self._add(event)
        interval = _INTERVAL + _INTERVAL_PER_MEGABYTE * len(self._text) / 1e6
        if time.monotonic() - self._written > interval:
            self.flush()

    def flush(self) -> None:
        """Write the events that the store does not have yet."""
        waiting = [] if self._waiting is None else [self._waiting]
        self._store.put(EVENTS, bytes(self._text) + _lines([*self._running.steps, *waiting]))
        self._written = time.monotonic()

    def _add(self, event: Event) -> None:
        self._waiting = event if isinstance(event, Waiting) else None
        if self._waiting is not None:
            return
        self._write(self._running.take(event))
        if isinstance(event, StepDone | ShardSteps):
            self.peak_bytes = max(self.peak_bytes, event.peak_bytes)
        if not isinstance(event, StepDone):
            self._write([event])

    def _write(self, events: Iterable[Event]) -> None:
        self._text += _lines(events)


def _lines(events: Iterable[Event]) -> bytes:
    return b"".join(event.line().encode() + b"\n" for event in events)


class RunningSteps:
    """The steps of shards that workers still hold."""

    def __init__(self) -> None:
        self._of: dict[str, list[StepDone]] = {}

    @property
    def steps(self) -> list[StepDone]:
        """All of them, oldest first."""
        return sorted((step for steps in self._of.values() for step in steps), key=lambda step: step.at)

    def take(self, event: Event) -> list[ShardSteps]:
        """Keep a step; the sums of those whose worker is done with its shard, as any event may say."""
        done: list[ShardSteps] = []
        match event:
            case StepDone(worker=worker):
                if worker in self._of and not _goes_on(self._of[worker][-1], event):
                    done = self._sums([worker])
                self._of.setdefault(worker, []).append(event)
            case ShardDone(worker=worker) | WorkerLost(worker=worker) | ShardYielded(worker=worker):
                done = self._sums([worker])
            case PassBegan() | RunBegan() | RunEnded():
                done = self.rest()
        return done

    def rest(self) -> list[ShardSteps]:
        """The sums of what is left, when nothing follows."""
        return self._sums(list(self._of))

    def _sums(self, workers: Sequence[str]) -> list[ShardSteps]:
        return [summed(self._of.pop(worker)) for worker in workers if worker in self._of]


def _goes_on(before: StepDone, step: StepDone) -> bool:
    return (step.stage, step.shard) == (before.stage, before.shard) and before.microbatch is not None


def summed(steps: Sequence[StepDone]) -> ShardSteps:
    """The steps of one worker on one shard, in order, as one."""
    last, others = steps[-1], [step.seconds for step in steps[1:] if step.microbatch is not None]
    finished = last.microbatch is None
    losses = [step.loss for step in steps if step.loss is not None]
    return ShardSteps(
        at=last.at,
        stage=last.stage,
        shard=last.shard,
        units=last.units,
        microbatch=last.microbatch,
        worker=last.worker,
        steps=len(steps),
        started=steps[0].started,
        ended=round(last.ended, 4),
        seconds=round(sum(step.seconds for step in steps), 4),
        peak_bytes=max(step.peak_bytes for step in steps),
        first=steps[0].seconds,
        median=statistics.median(others) if others else None,
        finish=last.seconds if finished else None,
        gap=round(max(0.0, last.started - steps[-2].ended), 4) if finished and len(steps) > 1 else None,
        tokens=_total(step.tokens for step in steps),
        hop_bytes=_total(step.hop_bytes for step in steps),
        loss=statistics.fmean(losses) if losses else None,
        read_bytes=_total(step.read_bytes for step in steps),
        written_bytes=_total(step.written_bytes for step in steps),
    )


def _total(values: Iterable[int | None]) -> int | None:
    """The sum of those that are there, None without any."""
    there = [value for value in values if value is not None]
    return sum(there) if there else None


def steps_by_shard(events: Iterable[Event]) -> list[ShardSteps]:
    """What workers did on each shard that they took, also where a log has its steps one by one."""
    running, found = RunningSteps(), list[ShardSteps]()
    for event in events:
        found += running.take(event)
        if isinstance(event, ShardSteps):
            found.append(event)
    return found + running.rest()
