"""Claims about what is cut off or slow: it is named, gone around where that can be, and no other worker pays for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import pool
from actors.connect import connected
from actors.deadlines import Deadlines
from actors.flights import QUIET
from actors.messages import Failure, Receipt
from actors.protocol import Call, CallKind
from actors.schedule.pass_graph import PassGraph
from actors.schedule.recovery import Recovery
from actors.schedule.units import PASSES, Shard, Stage
from prismaquant_ray.errors import DamagedError, PrismaquantError, ResourceError, StoreError
from prismaquant_ray.events import Event, Notice, Waiting, WorkerLost
from prismaquant_ray.settings.cluster import ClusterConfig
from tests.actors.test_controller import (
    HERE,
    SEEING,
    Handing,
    Output,
    Scripted,
    controller,
    receipt_of,
    shards,
    whole_pass,
)


class CutOff(Handing):
    """Workers of which some cannot fetch from some others: whoever is asked to says so, every time."""

    def __init__(self, *arguments: Any, cut: Callable[[str, str], bool], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cut = cut
        self.failed: Counter[tuple[str, str]] = Counter()

    def wait(self, timeout: float) -> Any:
        found = super().wait(timeout)
        if not found:
            # Nothing is asked of anybody: without this, time would stand still for whoever waits.
            self.now += timeout
        return found

    def arrived(self, call: Call) -> bool:
        (reader,) = [name for name, kind, _ in self.log[-1:] if kind is CallKind.RUN]
        if isinstance(call.arriving, Output) and self.cut(reader, call.arriving.worker):
            self.failed[reader, call.arriving.worker] += 1
            return False
        return super().arrived(call)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    stage=st.sampled_from(PASSES),
    workers=st.integers(2, 4),
    losses=st.integers(0, 3),
    stored=st.sampled_from([0.0, 0.3, 1.0]),
    cut=st.frozensets(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20),
)
def test_a_pass_ends_whichever_workers_cannot_reach_each_other(
    seed: int, stage: Stage, workers: int, losses: int, stored: float, cut: frozenset[tuple[int, int]]
) -> None:
    def is_cut(reader: str, maker: str) -> bool:
        return (int(reader.rpartition("-")[2]), int(maker.rpartition("-")[2])) in cut

    passed = whole_pass(SEEING, stage)
    cluster = CutOff(passed, seed, losses, stored, cut=is_cut)
    driver, events = controller(cluster, workers, recovery=Recovery(per_shard=99, starting=99))
    driver.run_pass(passed)
    finished = [event.shard for event in events if event.event == "shard"]
    assert sorted(finished) == sorted(shard.name for shard in passed)
    # Nobody is lost for it, and nobody tries again and again.
    assert len([event for event in events if isinstance(event, WorkerLost)]) == losses - cluster.losses
    assert max(cluster.failed.values(), default=0) <= 1 + cluster.now // 300


def test_what_cannot_be_fetched_is_read_from_the_store_and_said_once_by_name() -> None:
    passed = whole_pass(PassGraph(decoder=2, texts=6), Stage.FORWARD)
    cluster = CutOff(passed, 0, stored=1.0, cut=lambda reader, maker: reader != maker)
    driver, events = controller(cluster)
    driver.run_pass(passed)
    said = [event.message for event in events if isinstance(event, Notice) and "fetch" in event.message]
    assert said
    assert len(said) == len(set(said)) == sum(cluster.failed.values())
    assert re.fullmatch(r"worker-\d on here cannot fetch what worker-\d on here puts out; for 300 s it is .*", said[0])


def hanging(kind: CallKind, until: float) -> Scripted:
    """One call of a kind does not return before then."""
    workers = Scripted()
    workers.script = lambda _, call: "hang" if call.kind is kind and workers.now < until else None
    return workers


def told(events: Sequence[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Waiting)]


def test_a_wait_is_told_every_ten_seconds_with_what_is_waited_for() -> None:
    workers = hanging(CallKind.FINISH, 65.0)
    driver, events = controller(workers)
    driver.run_pass(shards(2)[:1])
    waits = [
        re.fullmatch(r"nothing new for (\d+) s; under way: worker-\d on here: forward finish 0000, \d+ s", each)
        for each in told(events)
    ]
    assert [int(found[1]) for found in waits if found] == [QUIET * n for n in range(1, 7)]


def test_a_wait_for_workers_is_told_too() -> None:
    workers = Scripted(room=0)
    driver, events = controller(workers, wanted=6, first=35.0)
    with pytest.raises(ResourceError, match="no worker could be started"):
        driver.wait_for_first()
    calls = "; ".join(f"worker-{number}: hello, 10 s" for number in range(4))
    assert told(events)[0] == f"nothing new for 10 s; under way: {calls}; 2 more"
    assert len(told(events)) == 3


# Deadlines ------------------------------------------------------------------------------------------------------------


def call_of(shard: Shard, kind: CallKind = CallKind.RUN, microbatch: int = 1) -> Call:
    return Call(kind=kind, shard=shard, microbatch=microbatch)


def test_a_call_may_take_many_times_what_its_kind_took_but_never_little() -> None:
    deadlines, (shard, *_) = Deadlines(), shards(3)
    step, finish = call_of(shard), call_of(shard, CallKind.FINISH)
    assert deadlines.of(step) == 1800
    for seconds in (40.0, 50.0, 900.0):
        deadlines.took(step, seconds)
    assert deadlines.of(step) == 20 * 50
    assert deadlines.of(finish) == 1800
    # The first microbatch loads the shard, so it is another kind.
    assert deadlines.of(call_of(shard, microbatch=0)) == 1800
    for _ in range(3):
        deadlines.took(finish, 0.01)
    assert deadlines.of(finish) == 300
    assert Deadlines(7.0).of(step) == 7


def test_a_shard_of_more_blocks_may_take_longer() -> None:
    (one, *_), (two, *_) = (whole_pass(PassGraph(decoder=4, texts=2), Stage.FORWARD, limit)[1:] for limit in (1, 2))
    assert (len(one.units), len(two.units)) == (1, 2)
    deadlines = Deadlines()
    for _ in range(3):
        deadlines.took(call_of(one), 100.0)
    assert deadlines.of(call_of(two)) == 2 * deadlines.of(call_of(one)) == 4000


# Storage --------------------------------------------------------------------------------------------------------------


def without_storage(failing: set[str], error: PrismaquantError) -> Scripted:
    def script(worker: str, call: Call) -> Receipt | None:
        failed = (
            worker in failing and call.kind in (CallKind.SETUP, CallKind.RUN) and (call.shard or worker > "worker-1")
        )
        return receipt_of(worker, failure=Failure.of(error)) if failed else None  # type: ignore[arg-type]

    return Scripted(script)


def test_a_worker_without_storage_is_lost_by_name_and_the_run_goes_on() -> None:
    # Wherever worker-1 is started again, storage is out of reach, too.
    failing = {f"worker-{number}" for number in range(1, 99)}
    workers = without_storage(failing, StoreError("s3://b/run: x cannot be read (timed out)"))
    driver, events = controller(workers, is_reachable=lambda: True)
    driver.run_pass(shards(99))
    lost = [event for event in events if isinstance(event, WorkerLost)]
    assert len(lost) > 5
    assert {event.cause for event in lost} == {"it cannot reach storage"}
    assert lost[0].message == "worker-1 on here: s3://b/run: x cannot be read (timed out)"
    assert len([event for event in events if event.event == "shard"]) == 4


@pytest.mark.parametrize(
    ("error", "reachable"),
    [(StoreError("gone"), False), (DamagedError("gone", "key"), True), (ResourceError("gone"), True)],
)
def test_what_concerns_more_than_one_worker_ends_the_pass(error: PrismaquantError, reachable: bool) -> None:
    driver, _ = controller(without_storage({"worker-1"}, error), is_reachable=lambda: reachable)
    with pytest.raises(type(error), match="gone"):
        driver.run_pass(shards(4))


def test_storage_out_of_reach_of_the_drivers_own_host_ends_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: HERE.host)
    driver, events = controller(without_storage({"worker-1"}, StoreError("gone")), is_reachable=lambda: True)
    with pytest.raises(StoreError, match="worker-1 on here: gone"):
        driver.run_pass(shards(4))
    assert not any(isinstance(event, WorkerLost) for event in events)


def test_no_worker_that_reaches_storage_ends_the_run() -> None:
    workers = without_storage({f"worker-{number}" for number in range(99)}, StoreError("gone"))
    driver, _ = controller(workers, is_reachable=lambda: True)
    with pytest.raises(ResourceError, match="the last because it cannot reach storage"):
        driver.run_pass(shards(4))


# Ray ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected(ClusterConfig(address="local", workers=1)):
        yield


@pytest.mark.ray
def test_a_worker_gives_up_what_does_not_arrive(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    @ray.remote(num_cpus=99)
    def never() -> None: ...

    ran: list[Any] = []
    monkeypatch.setattr(pool, "FETCH_SECONDS", 0.2)
    monkeypatch.setattr(pool.RayWorker, "run", lambda _, *arguments: ran.append(arguments))
    (shard, *_) = shards(1)
    worker = pool.RayWorker()
    assert worker.fetch_and_run(shard, 0, [never.remote()]) == (None, None)
    assert not ran
    worker.fetch_and_run(shard, 0, [ray.put(("float32", np.ones(2)))])
    assert [(microbatch, arriving[0]) for _, microbatch, arriving in ran] == [(0, "float32")]
