"""Claims about the schedule of a pass."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ring import FINISH, Ring, Step

SHAPE = {"visits": st.integers(1, 9), "microbatches": st.integers(1, 6), "workers": st.integers(1, 5)}


def drive(ring: Ring, workers: int, seed: int) -> list[tuple[int, Step]]:
    """Run to the end, finishing steps in a random order; the log of (worker, step) in the order they ended."""
    chance = random.Random(seed)
    flying: dict[int, Step] = {}
    log = []
    while not ring.finished:
        for worker in range(workers):
            if worker not in flying and (step := ring.next(worker)) is not None:
                flying[worker] = step
        assert flying, "deadlock"
        worker = chance.choice(sorted(flying))
        step = flying.pop(worker)
        ring.done(step)
        log.append((worker, step))
    return log


@settings(max_examples=200, deadline=None)
@given(**SHAPE, seed=st.integers(0, 1000))
def test_every_step_runs_once_in_an_order_that_respects_its_needs(
    visits: int, microbatches: int, workers: int, seed: int
) -> None:
    log = drive(Ring(visits=visits, microbatches=microbatches, workers=workers), workers, seed)
    position = {step: index for index, (_, step) in enumerate(log)}
    assert len(position) == len(log) == visits * (microbatches + 1)
    for worker, step in log:
        assert step.visit % workers == worker
        if step.microbatch == FINISH:
            assert all(position[Step(step.visit, m)] < position[step] for m in range(microbatches))
        elif step.visit:
            assert position[Step(step.visit - 1, step.microbatch)] < position[step]
        if step.microbatch > 0:
            assert position[Step(step.visit, step.microbatch - 1)] < position[step]


def test_all_workers_are_busy_once_the_pipeline_is_full() -> None:
    ring = Ring(visits=12, microbatches=8, workers=4)
    rounds, busy = 0, []
    while not ring.finished:
        steps = [step for worker in range(4) if (step := ring.next(worker)) is not None]
        for step in steps:
            ring.done(step)
        busy.append(len(steps))
        rounds += 1
    # Fill and drain cost three rounds each at four workers; in between nobody waits.
    assert min(busy[3:-3]) == 4


def test_a_step_is_done_once() -> None:
    ring = Ring(visits=1, microbatches=1, workers=1)
    step = ring.next(0)
    assert step is not None
    ring.done(step)
    with pytest.raises(ValueError, match="done before"):
        ring.done(step)


def test_an_empty_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Ring(visits=0, microbatches=1, workers=1)
