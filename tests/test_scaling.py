"""Claims about the simulation of the ring and the closed form of docs/scaling.md."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.controller import Call, CallKind, Controller, Reply
from actors.deadlines import Deadlines
from actors.messages import Machine, Receipt
from actors.schedule.pass_graph import PassGraph
from actors.schedule.shards import blocks_per_shard
from actors.schedule.units import PASSES, Exit, Shard, Stage
from benchmarks.scaling import durations_of, makespan, repeated
from benchmarks.simulation import (
    Calibration,
    Cost,
    Durations,
    busy_workers,
    first_run,
    outlook,
    predicted,
    row,
    shard_cost,
    shard_fill,
    simulate,
    whole_run,
)
from prismaquant_ray import __version__
from prismaquant_ray.events import Event, Events, StepDone, steps_of

HERE = Machine(version=__version__, pid=1, host="here", device="cpu", free_bytes=0, host_bytes=0)

# A block of the demo on one core: loading is quick, encoding takes as long as several microbatches.
REALISTIC = Durations(
    entry=Cost(load=0.1, microbatch=0.01, finish=0.01),
    forward=Cost(load=0.05, microbatch=0.25, finish=2.5),
    exit=Cost(load=0.2, microbatch=0.5, finish=0.01),
    backward=Cost(load=0.1, microbatch=0.7, finish=0.05),
    hop=0.01,
    call=0.002,
)


class VirtualWorkers:
    """Workers that take the time they are given, on a clock that jumps from one reply to the next."""

    def __init__(self, durations: Durations) -> None:
        self.durations = durations
        self.now = 0.0
        self.order = 0
        self.queue: list[tuple[float, int, Reply]] = []
        self.heads: set[str] = set()
        self.prefetched: dict[str, tuple[Shard, float]] = {}

    def clock(self) -> float:
        return self.now

    def start(self, worker: str) -> None:
        self._reply(0.0, worker, self.now)

    def submit(self, worker: str, call: Call) -> None:
        if call.kind is CallKind.SETUP:
            self._reply(0.0, worker, self.now)
            return
        assert call.shard is not None
        hop = self.durations.hop if call.arriving not in (None, worker) else 0.0
        started = self.now + self.durations.call + hop
        self._reply(self._seconds(worker, call, call.shard, started), worker, started)

    def _seconds(self, worker: str, call: Call, shard: Shard, started: float) -> float:
        cost, units = self.durations.of(shard), len(shard.units)
        if call.kind is CallKind.PREFETCH:
            self._read(worker, shard, started)
            return 0.0
        if call.kind is CallKind.FINISH:
            self._read(worker, call.following, started)
            return units * cost.finish
        load = 0.0
        if isinstance(shard.units[0], Exit):
            load = 0.0 if worker in self.heads else cost.load
            self.heads.add(worker)
        elif call.microbatch == shard.microbatches[0]:
            expected, ready = self.prefetched.pop(worker, (None, 0.0))
            load = max(0.0, ready - started) if expected == shard else units * cost.load
        return units * cost.microbatch + load

    def _read(self, worker: str, shard: Shard | None, started: float) -> None:
        """Blocks are read by a thread, one shard at a time."""
        if shard is None or not isinstance(shard.units[0], int):
            self.prefetched.pop(worker, None)
        else:
            self.prefetched[worker] = shard, started + len(shard.units) * self.durations.of(shard).load

    def _reply(self, seconds: float, worker: str, started: float) -> None:
        receipt = Receipt(worker=worker, started=started, seconds=seconds, peak_bytes=0, machine=HERE)
        self.order += 1
        entry = (started + seconds, self.order, Reply(worker=worker, receipt=receipt, output=worker))
        heapq.heappush(self.queue, entry)

    def wait(self, timeout: float) -> Sequence[Reply]:
        self.now = self.queue[0][0]
        replies = []
        while self.queue and self.queue[0][0] == self.now:
            replies.append(heapq.heappop(self.queue)[2])
        return replies

    def stop(self, worker: str) -> None:
        raise AssertionError("nothing hangs here")

    def describe(self) -> str:
        return "virtual"


def conducted(shards: Sequence[Shard], durations: Durations, workers: int) -> tuple[float, list[StepDone]]:
    """When the controller that runs use has driven a pass, and its step events."""
    log: list[Event] = []
    virtual = VirtualWorkers(durations)
    controller = Controller(
        virtual, Events(log.append), wanted=workers, first=1e9, deadlines=Deadlines(1e9), clock=virtual.clock
    )
    controller.wait_for_first()
    controller.run_pass(shards)
    return virtual.now, steps_of(log)


def costs(load: float, microbatch: tuple[float, float], finish: float) -> st.SearchStrategy[Cost]:
    low, high = microbatch
    return st.builds(
        Cost,
        load=st.floats(0, load),
        microbatch=st.floats(low, high),
        finish=st.one_of(st.just(0.0), st.floats(0, finish)),
    )


DURATIONS = st.builds(
    Durations,
    entry=costs(1, (0.0, 0.5), 0.1),
    forward=costs(4, (1.0, 1.0), 100),
    exit=costs(2, (0.1, 2.0), 0.1),
    backward=costs(4, (0.5, 4.0), 2),
    hop=st.floats(0, 0.125),
    call=st.floats(0, 0.01),
)
SHAPE = {"blocks": st.integers(1, 64), "microbatches": st.integers(1, 32), "workers": st.integers(1, 16)}


@settings(max_examples=40)
@given(blocks=st.integers(1, 12), microbatches=st.integers(1, 8), workers=st.integers(1, 6), durations=DURATIONS)
def test_the_simulation_takes_the_time_of_the_controller_on_virtual_workers(
    blocks: int, microbatches: int, workers: int, durations: Durations
) -> None:
    limit = blocks_per_shard(blocks=blocks, workers=workers, fitting=blocks)
    for stage in PASSES:
        shards = whole_run(blocks, microbatches, limit).of(stage)
        seconds, steps = conducted(shards, durations, workers)
        found = simulate(shards, durations, workers)
        assert found.seconds == pytest.approx(seconds)
        # Events round to a tenth of a millisecond.
        assert found.work == pytest.approx(sum(event.seconds for event in steps), abs=1e-4 * len(steps))


@settings(max_examples=40)
@given(
    graph=st.builds(
        PassGraph,
        decoder=st.integers(1, 6),
        texts=st.integers(1, 5),
        vision=st.integers(1, 4),
        images=st.integers(1, 4),
        draft=st.booleans(),
        head=st.booleans(),
    ),
    limit=st.integers(1, 3),
    workers=st.integers(1, 6),
    durations=DURATIONS,
)
def test_the_simulation_takes_that_time_with_images_and_leaves_too(
    graph: PassGraph, limit: int, workers: int, durations: Durations
) -> None:
    for stage in PASSES:
        shards = first_run(graph, limit).of(stage)
        seconds, steps = conducted(shards, durations, workers)
        found = simulate(shards, durations, workers)
        assert found.seconds == pytest.approx(seconds)
        assert found.work == pytest.approx(sum(event.seconds for event in steps), abs=1e-4 * len(steps))


@settings(max_examples=100)
@given(**SHAPE, fitting=st.integers(1, 64), durations=DURATIONS)
def test_the_closed_form_is_within_4_percent_forward_and_10_percent_backward(
    blocks: int, microbatches: int, workers: int, fitting: int, durations: Durations
) -> None:
    workers = min(workers, microbatches, blocks + 1)
    limit = blocks_per_shard(blocks=blocks, workers=workers, fitting=fitting)
    for stage in PASSES:
        shards = whole_run(blocks, microbatches, limit).of(stage)
        found = simulate(shards, durations, workers).seconds
        bound = 0.04 if stage is Stage.FORWARD else 0.1
        assert found == pytest.approx(predicted(shards, durations, workers), rel=bound)


@settings(max_examples=100)
@given(blocks=st.integers(1, 64), microbatches=st.integers(1, 32), limit=st.integers(1, 64), durations=DURATIONS)
def test_the_closed_form_is_exact_for_one_worker(
    blocks: int, microbatches: int, limit: int, durations: Durations
) -> None:
    for stage in PASSES:
        shards = whole_run(blocks, microbatches, limit).of(stage)
        assert predicted(shards, durations, 1) == pytest.approx(simulate(shards, durations, 1).seconds)


@settings(max_examples=100)
@given(blocks=st.integers(1, 8), microbatches=st.integers(1, 32), workers=st.integers(2, 8), durations=DURATIONS)
def test_the_closed_form_is_exact_for_one_shard_of_the_forward_pass(
    blocks: int, microbatches: int, workers: int, durations: Durations
) -> None:
    shards = whole_run(blocks, microbatches, blocks).forward
    assert predicted(shards, durations, workers) == pytest.approx(simulate(shards, durations, workers).seconds)


@pytest.mark.parametrize("workers", [2, 3, 4, 6, 8, 12, 16])
def test_workers_are_busy_85_percent_with_four_microbatches_and_four_shards_each(workers: int) -> None:
    work = whole_run(4 * workers, 4 * workers, 1)
    for stage in PASSES:
        busy = simulate(work.of(stage), REALISTIC, workers).busy
        assert len(busy) == workers
        assert min(busy.values()) >= 0.85


def test_more_workers_than_the_ring_can_fill_are_idle() -> None:
    block = REALISTIC.backward
    cost, fill = (
        shard_cost(block, 1, 8, hop=REALISTIC.hop, call=REALISTIC.call),
        shard_fill(block, 1, hop=REALISTIC.hop, call=REALISTIC.call),
    )
    most = busy_workers(cost, fill)
    shards = whole_run(64, 8, 1).backward
    inside, beyond = (simulate(shards, REALISTIC, workers).seconds for workers in (int(most), 4 * int(most)))
    assert inside < simulate(shards, REALISTIC, int(most) - 2).seconds
    assert beyond > 0.9 * inside


def test_encoding_lets_the_forward_pass_use_more_workers_than_microbatches() -> None:
    shards = whole_run(64, 4, 1).forward
    four, sixteen = (simulate(shards, REALISTIC, workers).seconds for workers in (4, 16))
    assert sixteen < 0.4 * four


def test_workers_without_a_shard_do_nothing() -> None:
    shards = whole_run(3, 8, 1).forward
    assert simulate(shards, REALISTIC, 50).seconds == pytest.approx(simulate(shards, REALISTIC, 4).seconds)


def test_every_input_but_the_stored_ones_hops_once() -> None:
    work = whole_run(12, 5, 2)
    assert simulate(work.forward, REALISTIC, 3).hops == 6 * 5
    assert simulate(work.backward, REALISTIC, 3).hops == 6 * 5
    assert simulate(work.forward, REALISTIC, 1).between_workers == 0


def test_durations_are_found_again_in_a_log() -> None:
    log = []
    for stage in PASSES:
        log += conducted(whole_run(12, 8, 2).of(stage), REALISTIC, 1)[1]
    found = durations_of(log)
    for kind in ("entry", "forward", "exit", "backward"):
        fitted, given_ = getattr(found, kind), getattr(REALISTIC, kind)
        # Blocks are read ahead, while the shard before is finished.
        hidden = given_.finish if kind in PASSES else 0.0
        assert fitted.load == pytest.approx(max(0.0, given_.load - hidden), abs=2e-3)
        assert fitted.microbatch == pytest.approx(given_.microbatch, abs=3e-4)
        assert fitted.finish == pytest.approx(given_.finish, abs=3e-4)
    assert found.call == pytest.approx(REALISTIC.call, abs=3e-4)
    assert repeated(log) == 0
    assert repeated([*log, log[0]]) == 1
    forward = [event for event in log if event.stage == "forward"]
    assert makespan(forward) == pytest.approx(simulate(whole_run(12, 8, 2).forward, REALISTIC, 1).seconds, abs=0.003)


def test_a_large_model_gains_from_gpus_until_something_named_limits_it() -> None:
    one, eight, many = (outlook(gpus) for gpus in (1, 8, 256))
    assert one.speedup == pytest.approx(1.0, abs=0.01)
    assert 6 < eight.speedup <= 8
    assert many.workers == Calibration().microbatches
    assert many.limit == "192 GPUs are not asked for"


def test_the_document_shows_what_the_command_prints() -> None:
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    for gpus in (1, 8, 16, 64):
        assert row(outlook(gpus), str(gpus)) in text
