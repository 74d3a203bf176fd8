"""Workers without Ray: plain ShardWorkers in this process behind the controller's protocol, lost on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from actors.messages import WorkerSpec
from actors.protocol import Call, CallKind, Reply
from actors.schedule.recovery import Cause
from actors.worker import ShardWorker
from jobs.pipeline.workers import OpenWorkers, WorkerPool

#: Asked before every call: raise to stop the driver, return a cause to lose the worker before it does anything.
Accident = Callable[[str, Call], Cause | None]


class InProcessWorkers:
    """Runs the oldest call at each `wait`. Outputs are handed over as Ray does: as read-only arrays."""

    def __init__(self, spec: WorkerSpec, accident: Accident) -> None:
        self.spec = spec
        self.accident = accident
        self.alive: dict[str, ShardWorker] = {}
        self.queue: list[tuple[str, Call]] = []
        self.log: list[tuple[str, Call]] = []

    def start(self, worker: str) -> None:
        self.alive[worker] = ShardWorker()
        self.queue.append((worker, Call(kind=CallKind.HELLO)))

    def submit(self, worker: str, call: Call) -> None:
        assert not any(name == worker for name, _ in self.queue), "one call in flight a worker"
        self.queue.append((worker, call))

    def wait(self, timeout: float) -> Sequence[Reply]:
        if not self.queue:
            return []
        worker, call = self.queue.pop(0)
        cause = self.accident(worker, call)
        if cause is not None:
            del self.alive[worker]
            return [Reply(worker=worker, lost=(cause, "as the test wanted"))]
        self.log.append((worker, call))
        return [self._call(worker, call)]

    def _call(self, name: str, call: Call) -> Reply:
        worker, output = self.alive[name], None
        if call.kind is CallKind.HELLO:
            receipt = worker.hello()
        elif call.kind is CallKind.SETUP:
            receipt = worker.setup(replace(self.spec, name=name))
        elif call.kind is CallKind.DIAGNOSE:
            receipt = worker.diagnose(replace(self.spec, name=name))
        elif call.kind is CallKind.PREFLIGHT:
            receipt = worker.preflight()
        elif call.kind is CallKind.DROP:
            receipt = worker.drop()
        elif call.kind is CallKind.FINISH:
            receipt = worker.finish(call.shard, call.following)
        elif call.kind is CallKind.PREFETCH:
            receipt = worker.prefetch(call.shard)
        else:
            output, receipt = worker.run(call.shard, call.microbatch, call.arriving)
            if output is not None:
                output[1].flags.writeable = False
        return Reply(worker=name, receipt=receipt, output=output)

    def stop(self, worker: str) -> None:
        self.queue = [entry for entry in self.queue if entry[0] != worker]
        del self.alive[worker]

    def describe(self) -> str:
        return f"{len(self.alive)} workers live in this process"


def never(worker: str, call: Call) -> None:
    """No accident."""


def after(steps: int) -> Accident:
    """The driver is killed after so many steps."""
    left = iter(range(steps))

    def accident(worker: str, call: Call) -> None:
        if call.kind in (CallKind.RUN, CallKind.FINISH) and next(left, None) is None:
            raise KeyboardInterrupt

    return accident


def in_process(
    workers: int = 1, accident: Accident = never, opened: list[InProcessWorkers] | None = None
) -> OpenWorkers:
    """An `open_workers` for `jobs.run.Run`; `opened` collects what was opened."""

    @contextmanager
    def open_workers(spec: WorkerSpec, at_most: int) -> Iterator[WorkerPool]:
        found = InProcessWorkers(spec, accident)
        if opened is not None:
            opened.append(found)
        yield WorkerPool(workers=found, wanted=min(workers, at_most), sharing=lambda: 1)

    return open_workers


def unopened(*_: Any) -> Any:
    """An `open_workers` for runs that must not need any."""
    raise AssertionError("workers must not be opened")
