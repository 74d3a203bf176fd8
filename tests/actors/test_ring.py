"""Claims about the schedule of a pass."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.schedule.ring import FINISH, Ring, Step

SHAPE = {"shards": st.integers(1, 9), "microbatches": st.integers(1, 6), "workers": st.integers(1, 5)}


def ring_of(shards: int, microbatches: int, sources: list[int] | None = None) -> Ring:
    """Shards that each read from the one before, or from the one that `sources` says; −1 is the store."""
    every = range(microbatches)
    before = sources if sources is not None else [shard - 1 for shard in range(shards)]
    return Ring([every] * shards, [dict.fromkeys(every, source) if source >= 0 else {} for source in before])


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    """Where each shard reads from: some outputs are read by several shards, some shards read from the store."""
    return [draw(st.integers(-1, shard - 1)) for shard in range(draw(st.integers(1, 9)))]


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
            # Every worker waits for a lost shard: the one with the last shard gives it up, as the controller does.
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
    respects_needs([shard - 1 for shard in range(shards)], microbatches, workers, seed)


@settings(max_examples=200)
@given(sources=trees(), microbatches=SHAPE["microbatches"], workers=SHAPE["workers"], seed=st.integers(0, 1000))
def test_so_it_does_where_several_shards_read_from_one(
    sources: list[int], microbatches: int, workers: int, seed: int
) -> None:
    respects_needs(sources, microbatches, workers, seed)


def respects_needs(sources: list[int], microbatches: int, workers: int, seed: int) -> None:
    shards = len(sources)
    log = drive(ring_of(shards, microbatches, sources), workers, seed)
    position = {step: index for index, (_, step) in enumerate(log)}
    assert len(position) == len(log) == shards * (microbatches + 1)
    holder = {}
    for worker, step in log:
        assert holder.setdefault(step.shard, worker) == worker, "a shard stays with one worker"
        if step.microbatch == FINISH:
            assert all(position[Step(step.shard, m)] < position[step] for m in range(microbatches))
        elif sources[step.shard] >= 0:
            assert position[Step(sources[step.shard], step.microbatch)] < position[step]
        if step.microbatch > 0:
            assert position[Step(step.shard, step.microbatch - 1)] < position[step]


@settings(max_examples=300)
@given(**SHAPE, seed=st.integers(0, 1000), losses=st.integers(1, 6))
def test_losses_delay_but_never_block_and_every_shard_finishes_once(
    shards: int, microbatches: int, workers: int, seed: int, losses: int
) -> None:
    finishes_in_spite_of_losses([shard - 1 for shard in range(shards)], microbatches, workers, seed, losses)


@settings(max_examples=200)
@given(
    sources=trees(),
    microbatches=SHAPE["microbatches"],
    workers=SHAPE["workers"],
    seed=st.integers(0, 1000),
    losses=st.integers(1, 6),
)
def test_losses_never_block_where_several_shards_read_from_one(
    sources: list[int], microbatches: int, workers: int, seed: int, losses: int
) -> None:
    finishes_in_spite_of_losses(sources, microbatches, workers, seed, losses)


def finishes_in_spite_of_losses(sources: list[int], microbatches: int, workers: int, seed: int, losses: int) -> None:
    shards = len(sources)
    log = drive(ring_of(shards, microbatches, sources), workers, seed, losses)
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


def test_shards_that_read_from_one_run_side_by_side() -> None:
    # Block 0, then a draft that takes the first microbatch only and a head that takes both.
    ring = Ring([[0, 1], [0], [0, 1]], [{}, {0: 0}, {0: 0, 1: 0}])
    ring.next("a")
    ring.done("a", Step(0, 0))
    assert [ring.next(name) for name in "bc"] == [Step(1, 0), Step(2, 0)]
    ring.done("c", Step(2, 0))
    assert ring.next("c") is None, "microbatch 1 is not there yet"
    ring.done("b", Step(1, 0))
    assert ring.next("b") == Step(1, FINISH)
    ring.next("a")
    ring.done("a", Step(0, 1))
    assert ring.next("c") == Step(2, 1)


def test_a_worker_that_has_nothing_to_run_expects_the_first_shard_that_no_other_does() -> None:
    ring = ring_of(5, 2)
    assert ring.next("a") == Step(0, 0)
    assert [ring.prefetch(name) for name in ("b", "c", "b", "a")] == [1, 2, None, 3]
    assert ring.released("b") is None
    assert ring.prefetch("c") == 1, "what a lost worker expected is free again, and comes first"
    assert ring.prefetch("d") == 2


def test_who_expects_a_shard_is_asked_first_and_takes_it() -> None:
    ring = ring_of(4, 1)
    ring.next("d")
    assert (ring.prefetch("c"), ring.prefetch("b"), ring.prefetch("a")) == (1, 2, 3)
    ring.done("d", Step(0, 0))
    assert ring.order(["a", "b", "c", "d"]) == ["c", "a", "b", "d"]
    # Nobody waits for a reader that is busy: reading ahead is no claim.
    assert ring.next("a") == Step(1, 0)
    ring.done("a", Step(1, 0))
    assert ring.next("b") == Step(2, 0)


def test_of_several_shards_a_worker_takes_the_one_it_expects_and_else_one_that_nobody_does() -> None:
    ring = Ring([[0]] * 4, [{}] * 4)
    assert [ring.prefetch(name) for name in "ab"] == [0, 1]
    assert ring.next("b") == Step(1, 0)
    assert ring.next("c") == Step(2, 0)
    assert ring.next("a") == Step(0, 0)


def test_what_is_no_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="a pass needs a shard"):
        Ring([], [])
    with pytest.raises(ValueError, match="every shard a microbatch"):
        Ring([[]], [{}])
    with pytest.raises(ValueError, match="only read from shards before it"):
        Ring([[0], [0]], [{0: 1}, {}])
