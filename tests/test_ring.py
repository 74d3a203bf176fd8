"""Claims about the schedule of a pass."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ring import FINISH, Ring, Step

SHAPE = {"shards": st.integers(1, 9), "microbatches": st.integers(1, 6), "workers": st.integers(1, 5)}


def ring_of(shards: int, microbatches: int) -> Ring:
    """A chain."""
    every = range(microbatches)
    return Ring([every] * shards, [dict.fromkeys(every, shard - 1) if shard else {} for shard in range(shards)])


def drive(ring: Ring, workers: int, seed: int, losses: int = 0) -> list[tuple[str, Step]]:
    """Run to the end, finishing steps in a random order and losing workers at random; (worker, step) as they ended."""
    chance = random.Random(seed)
    names = [f"w{index}" for index in range(workers)]
    flying: dict[str, Step] = {}
    log = []
    while not ring.finished:
        for worker in names:
            if worker not in flying and (step := ring.next(worker)) is not None:
                flying[worker] = step
        if not flying:
            # Every worker waits for a lost shard: the one with the last shard gives it up, as the conductor does.
            blocking = ring.blocking()
            assert blocking, "deadlock"
            worker = max(ring.held, key=lambda name: ring.held[name])
            assert ring.held[worker] > blocking[0]
            ring.released(worker)
            continue
        worker = chance.choice(sorted(flying))
        step = flying.pop(worker)
        if losses and chance.random() < 0.2:
            losses -= 1
            lost = ring.released(worker)
            for microbatch in ring.microbatches[lost]:
                if chance.random() < 0.5:  # the rest had reached the store
                    ring.vanished(Step(lost, microbatch))
            continue
        ring.done(worker, step)
        log.append((worker, step))
    return log


@settings(max_examples=200)
@given(**SHAPE, seed=st.integers(0, 1000))
def test_every_step_runs_once_in_an_order_that_respects_its_needs(
    shards: int, microbatches: int, workers: int, seed: int
) -> None:
    log = drive(ring_of(shards, microbatches), workers, seed)
    position = {step: index for index, (_, step) in enumerate(log)}
    assert len(position) == len(log) == shards * (microbatches + 1)
    holder = {}
    for worker, step in log:
        assert holder.setdefault(step.shard, worker) == worker, "a shard stays with one worker"
        if step.microbatch == FINISH:
            assert all(position[Step(step.shard, m)] < position[step] for m in range(microbatches))
        elif step.shard:
            assert position[Step(step.shard - 1, step.microbatch)] < position[step]
        if step.microbatch > 0:
            assert position[Step(step.shard, step.microbatch - 1)] < position[step]


@settings(max_examples=300)
@given(**SHAPE, seed=st.integers(0, 1000), losses=st.integers(1, 6))
def test_losses_delay_but_never_block_and_every_shard_finishes_once(
    shards: int, microbatches: int, workers: int, seed: int, losses: int
) -> None:
    log = drive(ring_of(shards, microbatches), workers, seed, losses)
    finished = [step.shard for _, step in log if step.microbatch == FINISH]
    assert sorted(finished) == list(range(shards))
    for shard in range(shards):
        # The attempt that finished took every microbatch, in order, on one worker.
        steps = [(worker, step.microbatch) for worker, step in log if step.shard == shard]
        assert [m for _, m in steps[-microbatches - 1 :]] == [*range(microbatches), FINISH]
        assert len({worker for worker, _ in steps[-microbatches - 1 :]}) == 1


def test_equal_workers_take_shards_in_turn_and_are_all_busy_once_the_pipeline_is_full() -> None:
    ring = ring_of(12, 8)
    names = [f"w{index}" for index in range(4)]
    busy, holder = [], {}
    while not ring.finished:
        steps = {name: step for name in names if (step := ring.next(name)) is not None}
        for name, step in steps.items():
            ring.done(name, step)
            holder[step.shard] = name
        busy.append(len(steps))
    # Fill and drain cost three rounds each at four workers; in between nobody waits.
    assert min(busy[3:-3]) == 4
    assert holder == {shard: names[shard % 4] for shard in range(12)}


def test_a_shard_that_reads_from_the_store_does_not_wait() -> None:
    ring = Ring([[0], [0]], [{}, {}])
    assert ring.next("a") == Step(0, 0)
    assert ring.next("b") == Step(1, 0)


def test_what_vanished_is_waited_for_until_it_appears() -> None:
    ring = ring_of(2, 1)
    ring.next("a")
    ring.done("a", Step(0, 0))
    ring.vanished(Step(0, 0))
    assert ring.next("b") is None
    ring.appeared(Step(0, 0))
    assert ring.next("b") == Step(1, 0)


def test_a_step_is_done_once_and_by_its_holder() -> None:
    ring = ring_of(1, 1)
    step = ring.next("a")
    assert step is not None
    with pytest.raises(ValueError, match="cannot have done"):
        ring.done("b", step)
    ring.done("a", step)
    with pytest.raises(ValueError, match="cannot have done"):
        ring.done("a", step)


def test_shards_that_share_the_work_before_a_shard_run_side_by_side() -> None:
    # Four exits of one microbatch each, then a block that reads all of them.
    ring = Ring([[0], [1], [2], [3], [0, 1, 2, 3]], [{}, {}, {}, {}, {0: 0, 1: 1, 2: 2, 3: 3}])
    assert [ring.next(name) for name in "abc"] == [Step(0, 0), Step(1, 1), Step(2, 2)]
    for name, step in zip("ac", [Step(0, 0), Step(2, 2)], strict=True):
        ring.done(name, step)
        ring.done(name, Step(step.shard, FINISH))
    assert ring.next("a") == Step(3, 3)
    assert ring.next("c") == Step(4, 0)
    ring.done("c", Step(4, 0))
    assert ring.next("c") is None, "microbatch 1 is not there yet, and the order of microbatches is kept"
    ring.done("b", Step(1, 1))
    assert ring.next("c") == Step(4, 1)


def test_what_is_no_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="a pass needs a shard"):
        Ring([], [])
    with pytest.raises(ValueError, match="every shard a microbatch"):
        Ring([[]], [{}])
    with pytest.raises(ValueError, match="only read from shards before it"):
        Ring([[0], [0]], [{0: 1}, {}])
