"""Claims about driving a pass: what is replaced, what stops a run, who gives way. Workers are scripted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from actors.conductor import Conductor
from actors.events import Event, Events
from actors.messages import Failure, Receipt, Shard, Stage
from actors.recovery import Cause, Loss, Recovery, yielding
from actors.workers import Call, Kind, Reply
from prismaquant_ray import __version__
from prismaquant_ray.errors import DamagedError, InputError, ResourceError

FACTS = {"version": __version__, "host": "here", "pid": 1, "device": "cpu"}


def shards(microbatches: int) -> list[Shard]:
    """Four blocks, one a shard."""
    return [
        Shard(
            stage=Stage.FORWARD,
            units=(index,),
            produce=frozenset({index}),
            origins=("entry" if index == 0 else index - 1,),
            microbatches=tuple(range(microbatches)),
        )
        for index in range(4)
    ]


class Scripted:
    """Workers that do nothing but answer; `script` may answer in their place, or hold a call back for ever."""

    def __init__(self, script: Callable[[str, Call], Any] = lambda *_: None, room: int = 99) -> None:
        self.script = script
        self.room = room
        self.queue: list[tuple[str, Call]] = []
        self.pending: list[str] = []
        self.log: list[tuple[str, Kind, int | None]] = []
        self.now = 0.0

    def start(self, worker: str) -> None:
        if self.room:
            self.room -= 1
            self.queue.append((worker, Call(kind=Kind.HELLO)))
        else:
            self.pending.append(worker)

    def submit(self, worker: str, call: Call) -> None:
        self.queue.append((worker, call))

    def wait(self, timeout: float) -> Sequence[Reply]:
        self.now += timeout
        replies = []
        for worker, call in list(self.queue):
            answer = self.script(worker, call)
            if answer == "hang":
                continue
            self.queue.remove((worker, call))
            self.log.append((worker, call.kind, call.shard and call.shard.units[0]))
            if isinstance(answer, Cause):
                replies.append(Reply(worker=worker, lost=(answer, "scripted")))
                continue
            receipt = answer if isinstance(answer, Receipt) else receipt_of(worker, FACTS)
            replies.append(Reply(worker=worker, receipt=receipt, output=f"{call.shard}"))
        return replies

    def stop(self, worker: str) -> None:
        self.queue = [entry for entry in self.queue if entry[0] != worker]

    def describe(self) -> str:
        return "the cluster has 0 GPUs and 2 CPUs on 1 nodes"


def unit(call: Call) -> Any:
    return call.shard and call.shard.units[0]


def receipt_of(worker: str, facts: dict[str, Any], failure: Failure | None = None) -> Receipt:
    return Receipt(worker=worker, started=0.0, seconds=1.0, peak_bytes=1, facts=facts, failure=failure)


def conductor(workers: Scripted, wanted: int = 2, **options: Any) -> tuple[Conductor, list[Event]]:
    events: list[Event] = []
    settings = {"timeout": 100.0, "first": 60.0, "clock": lambda: workers.now, **options}
    return Conductor(workers, Events(events.append), wanted=wanted, **settings), events


def once(*losses: tuple[Kind, int, Cause]) -> Callable[[str, Call], Cause | None]:
    """Each (kind, unit) is lost the first time it is tried."""
    left = {(kind, unit): cause for kind, unit, cause in losses}
    return lambda _, call: left.pop((call.kind, call.shard.units[0]), None) if call.shard else None


def test_a_lost_worker_is_replaced_and_only_its_shard_is_run_again() -> None:
    workers = Scripted(once((Kind.FINISH, 1, Cause.PROCESS)))
    driver, events = conductor(workers)
    driver.run_pass(shards(3))
    runs = [unit for _, kind, unit in workers.log if kind is Kind.RUN]
    assert [runs.count(unit) for unit in range(4)] == [3, 6, 3, 3]
    lost = [event.facts for event in events if event.kind == "lost"]
    assert [(entry["cause"], entry["shard"]) for entry in lost] == [("its process died", "forward 0001")]
    assert {name for name, kind, _ in workers.log if kind is Kind.SETUP} == {"worker-0", "worker-1", "worker-2"}


def test_a_call_that_hangs_costs_the_worker() -> None:
    hung: list[Call] = []

    def script(worker: str, call: Call) -> Any:
        if call.kind is Kind.FINISH and (not hung or call in hung):
            hung.append(call)
            return "hang" if worker in ("worker-0", "worker-1") and len(set(map(id, hung))) == 1 else None
        return None

    workers = Scripted(script)
    driver, events = conductor(workers, wanted=1)
    driver.run_pass(shards(1)[:1])
    assert [event.facts["cause"] for event in events if event.kind == "lost"] == ["it did not answer in time"]


def test_a_worker_without_replacement_gives_its_shard_up_for_one_that_blocks_all() -> None:
    # Two workers, no room for a third: worker-0 dies in shard 0 while worker-1 holds shard 1 and waits for it.
    tried: list[Call] = []

    def script(worker: str, call: Call) -> Any:
        if worker == "worker-0" and call.kind is Kind.RUN and call.microbatch == 1:
            tried.append(call)
            return Cause.NODE
        return None

    workers = Scripted(script, room=2)
    driver, events = conductor(workers, patience=30.0)
    driver.run_pass(shards(3))
    assert len(tried) == 1
    assert [event.facts["worker"] for event in events if event.kind == "yielded"] == ["worker-1"]
    finished = [event.facts["units"][0] for event in events if event.kind == "shard"]
    assert finished == ["0000", "0001", "0002", "0003"]


def test_a_shard_that_kills_three_workers_ends_the_run_by_name() -> None:
    workers = Scripted(lambda _, call: Cause.MEMORY if unit(call) == 2 and call.kind is Kind.FINISH else None)
    driver, _ = conductor(workers)
    with pytest.raises(ResourceError, match=r"forward 0002 lost 3 workers, the last because its node ran out of memor"):
        driver.run_pass(shards(2))


def test_lost_nodes_are_not_held_against_a_shard() -> None:
    left = [Cause.NODE] * 6
    workers = Scripted(lambda _, call: left.pop() if left and call.kind is Kind.FINISH else None)
    driver, events = conductor(workers)
    driver.run_pass(shards(2))
    assert len([event for event in events if event.kind == "lost"]) == 6


def test_a_cluster_where_workers_cannot_start_ends_the_run() -> None:
    workers = Scripted(lambda *_: Cause.PROCESS)
    driver, _ = conductor(workers, first=1000.0)
    with pytest.raises(ResourceError, match="5 workers in a row were lost while they started"):
        driver.wait_for_first()
    with pytest.raises(ResourceError, match="no worker could be started in 60 s; the cluster has 0 GPUs and 2 CPUs"):
        conductor(Scripted(room=0))[0].wait_for_first()


def test_a_cluster_that_is_gone_in_the_middle_ends_the_run() -> None:
    workers = Scripted(lambda _, call: Cause.NODE if unit(call) == 1 else None, room=1)
    driver, _ = conductor(workers, wanted=1)
    with pytest.raises(ResourceError, match="no worker is left and none could be started in 60 s"):
        driver.run_pass(shards(2))


def test_what_a_worker_reports_rises_as_it_is() -> None:
    failure = Failure.of(DamagedError("forward/0001/x is damaged", "forward/0001/x"))
    workers = Scripted(lambda worker, call: receipt_of(worker, {}, failure) if unit(call) == 1 else None)
    driver, _ = conductor(workers)
    with pytest.raises(DamagedError, match="is damaged") as caught:
        driver.run_pass(shards(2))
    assert caught.value.key == "forward/0001/x"
    workers.script = lambda *_: None
    driver.abandon()
    driver.run_pass(shards(2))
    assert ("worker-0", Kind.DROP, None) in workers.log


def test_another_version_on_a_worker_is_refused() -> None:
    workers = Scripted(lambda worker, _: receipt_of(worker, {**FACTS, "version": "0.0.1"}))
    with pytest.raises(ResourceError, match=r"a worker on here has prismaquant-ray 0\.0\.1, the driver "):
        conductor(workers)[0].wait_for_first()


def test_a_worker_that_may_not_join_ends_the_run() -> None:
    def refuse(facts: Any) -> None:
        raise InputError("another device")

    with pytest.raises(InputError, match="another device"):
        conductor(Scripted(), admit=refuse)[0].wait_for_first()


def test_the_verdict_counts_each_kind_of_loss_by_itself() -> None:
    def loss(cause: Cause, shard: str | None = "a", ready: bool = True) -> Loss:
        return Loss(worker="w", cause=cause, shard=shard, was_ready=ready)

    policy = Recovery(per_shard=2, starting=2, nodes=3)
    assert policy.verdict([loss(Cause.PROCESS)]) is None
    assert policy.verdict([loss(Cause.PROCESS), loss(Cause.PROCESS, "b")]) is None
    assert policy.verdict([loss(Cause.PROCESS), loss(Cause.NODE), loss(Cause.TIMEOUT)]) is not None
    assert policy.verdict([loss(Cause.PROCESS, None, False)] * 2) is not None
    assert policy.verdict([loss(Cause.PROCESS, None), loss(Cause.PROCESS, None)]) is None
    assert policy.verdict([loss(Cause.NODE)] * 3) is not None


def test_whoever_holds_the_last_shard_gives_way_and_only_to_an_earlier_one() -> None:
    assert yielding({"a": 3, "b": 5}, [2]) == "b"
    assert yielding({"a": 1}, [2]) is None
    assert yielding({}, [0]) is None
    assert yielding({"a": 1}, []) is None
