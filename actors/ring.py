"""The schedule of a pass, as a pure state machine: who runs what next.

Visits (one loaded unit each) form a pipeline over microbatches: step (v, m) needs step (v−1, m). Visit v belongs to
worker v mod W, and each worker takes its visits in order, so while worker 0 runs microbatch m of a visit, worker 1
runs m−1 of the next one. After the last microbatch of a visit comes its FINISH step, which nothing waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.messages import Receipt, Stage, Unit

FINISH = -1


@dataclass(frozen=True, slots=True)
class Step:
    """A microbatch of a visit, or its FINISH."""

    visit: int
    microbatch: int


class Ring:
    """Which step each worker takes next. Every step is handed out once."""

    def __init__(self, *, visits: int, microbatches: int, workers: int) -> None:
        if min(visits, microbatches, workers) < 1:
            raise ValueError(f"{visits} visits, {microbatches} microbatches, {workers} workers: each must be positive")
        self._order = (*range(microbatches), FINISH)
        self._programs = [
            [Step(visit, m) for visit in range(worker, visits, workers) for m in self._order]
            for worker in range(workers)
        ]
        self._position = [0] * workers
        self._done: set[Step] = set()
        self._steps = visits * len(self._order)

    def next(self, worker: int) -> Step | None:
        """The worker's next step if it can run now; it counts as handed out. None: nothing to do yet, or ever."""
        position = self._position[worker]
        if position == len(self._programs[worker]):
            return None
        step = self._programs[worker][position]
        before = Step(step.visit - 1, step.microbatch)
        if step.microbatch != FINISH and step.visit > 0 and before not in self._done:
            return None
        self._position[worker] += 1
        return step

    def done(self, step: Step) -> None:
        """The step's result is there."""
        if step in self._done:
            raise ValueError(f"{step} was done before")
        self._done.add(step)

    @property
    def finished(self) -> bool:
        """Every step is done."""
        return len(self._done) == self._steps


#: Called with each receipt as it arrives.
Listener = Callable[[Stage, Unit, Step, Receipt], None]


class PassRunner(Protocol):
    """Workers that can be driven over a pass."""

    peak_bytes: int

    def run_pass(self, stage: Stage, units: Sequence[Unit], microbatches: int, listener: Listener) -> None:
        """Visit the units in order; raise the error a worker reports."""
        ...
