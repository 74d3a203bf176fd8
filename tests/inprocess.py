"""Workers without Ray: the same ring over plain ShardWorkers in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from actors.messages import Receipt, Stage, Unit, WorkerSpec
from actors.ring import FINISH, Listener, Ring, Step
from actors.shard_worker import ShardWorker
from prismaquant_ray import errors


class InProcessPool:
    """Runs one step at a time, workers in turn.

    After `stop_after` steps it raises, as if the driver had been killed. A `stuck` visit never takes its last step:
    everything else of the pass is done, then it raises.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        workers: int,
        stop_after: int | None = None,
        stuck: tuple[Stage, Unit] | None = None,
    ) -> None:
        self.stuck = stuck
        self.workers = [ShardWorker(replace(spec, name=f"worker-{index}")) for index in range(workers)]
        self.peak_bytes = 0
        self.steps = 0
        self.stop_after = stop_after
        for worker in self.workers:
            self._accept(worker.setup())

    def run_pass(self, stage: Stage, units: Sequence[Unit], microbatches: int, listener: Listener) -> None:
        ring = Ring(visits=len(units), microbatches=microbatches, workers=len(self.workers))
        leaving = {}
        while not ring.finished:
            before = self.steps
            for index, worker in enumerate(self.workers):
                step = ring.next(index)
                if step is None or (step.microbatch == FINISH and self.stuck == (stage, units[step.visit])):
                    continue
                if self.steps == self.stop_after:
                    raise KeyboardInterrupt
                self.steps += 1
                unit = units[step.visit]
                if step.microbatch == FINISH:
                    receipt = worker.finish(stage, unit)
                else:
                    arriving = leaving.pop(Step(step.visit - 1, step.microbatch), None)
                    origin = units[step.visit - 1] if step.visit else None
                    leaving[step], receipt = worker.run(stage, unit, step.microbatch, origin, arriving)
                self._accept(receipt)
                ring.done(step)
                listener(stage, unit, step, receipt)
            if self.steps == before:
                raise KeyboardInterrupt

    def _accept(self, receipt: Receipt) -> None:
        self.peak_bytes = max(self.peak_bytes, receipt.peak_bytes)
        if receipt.failure is not None:
            raise getattr(errors, receipt.failure.kind)(receipt.failure.message)


def in_process(workers: int = 1, stop_after: int | None = None, stuck: tuple[Stage, Unit] | None = None):
    """An `open_pool` for `jobs.run.Run`."""

    @contextmanager
    def open_pool(spec: WorkerSpec, at_most: int) -> Iterator[InProcessPool]:
        yield InProcessPool(spec, min(workers, at_most), stop_after, stuck)

    return open_pool
