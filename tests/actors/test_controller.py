"""Claims about driving a pass: what is replaced, what stops a run, who gives way. Workers are scripted."""

from __future__ import annotations

import random
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.controller import Controller
from actors.deadlines import Deadlines
from actors.messages import Failure, Receipt
from actors.pass_state import WAITING_BYTES, sources_of
from actors.protocol import Call, CallKind, Reply
from actors.schedule.pass_graph import PassGraph
from actors.schedule.recovery import Cause, LostWorker, Recovery, yielding
from actors.schedule.run_store import Recorded
from actors.schedule.shards import pending_shards
from actors.schedule.units import PASSES, Shard, Stage, Unit
from prismaquant_ray import __version__
from prismaquant_ray.errors import DamagedError, InputError, ResourceError
from prismaquant_ray.events import Event, Events, Machine, WorkerLost
from prismaquant_ray.storage.record import Artifact

HERE = Machine(version=__version__, pid=1, host="here", device="cpu", free_bytes=10**9, host_bytes=10**9)


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
        self.log: list[tuple[str, CallKind, int | None]] = []
        self.now = 0.0

    def start(self, worker: str) -> None:
        if self.room:
            self.room -= 1
            self.queue.append((worker, Call(kind=CallKind.HELLO)))
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
            receipt = answer if isinstance(answer, Receipt) else receipt_of(worker, HERE)
            replies.append(Reply(worker=worker, receipt=receipt, output=f"{call.shard}"))
        return replies

    def stop(self, worker: str) -> None:
        self.queue = [entry for entry in self.queue if entry[0] != worker]

    def describe(self) -> str:
        return "the cluster has 0 GPUs and 2 CPUs on 1 nodes"


def unit(call: Call) -> Any:
    return call.shard and call.shard.units[0]


def receipt_of(worker: str, machine: Machine | None = None, failure: Failure | None = None) -> Receipt:
    return Receipt(worker=worker, started=0.0, seconds=1.0, peak_bytes=1, machine=machine, failure=failure)


def controller(workers: Scripted, wanted: int = 2, **options: Any) -> tuple[Controller, list[Event]]:
    events: list[Event] = []
    settings = {"first": 60.0, "deadlines": Deadlines(100.0), "clock": lambda: workers.now, **options}
    return Controller(workers, Events(events.append), wanted=wanted, **settings), events


#: Two texts and an image; the merger reads images only, the draft texts only, draft and head the same decoder block.
SEEING = PassGraph(decoder=2, texts=2, vision=2, images=1, draft=True, head=True)


def whole_pass(graph: PassGraph, stage: Stage, limit: int = 1) -> tuple[Shard, ...]:
    """The shards of a first run."""
    nothing = Recorded(done=frozenset(), boundaries=frozenset())
    return pending_shards(graph, nothing, nothing, limit=limit).of(stage)


@dataclass(frozen=True, eq=False, weakref_slot=True, slots=True)
class Output:
    """What a step put out, in the memory of its worker's node."""

    unit: Unit
    microbatch: int
    worker: str


class Handing(Scripted):
    """Workers that check what they are handed, and lose it with their nodes.

    Outputs reach the store some steps later, at FINISH at the latest; of those that FINISH wrote nobody is told, but
    they have a record.
    """

    #: Bytes of what a step puts out.
    size = 0

    def __init__(self, passed: Sequence[Shard], seed: int, losses: int = 0, stored: float = 0.5) -> None:
        super().__init__()
        self.passed = passed
        self.chance = random.Random(seed)
        self.losses = losses
        self.stored = stored
        self.gone: set[str] = set()
        self.waiting: dict[str, list[int]] = {}
        self.recorded: set[Unit] = set()
        self.outputs: dict[tuple[Unit, int], weakref.ref[Output]] = {}
        self.read: set[tuple[Unit, Unit, int]] = set()
        self.turns = 0

    def readers(self, unit: Unit, microbatch: int) -> list[Unit]:
        """First units of the shards that take a microbatch of what a unit puts out."""
        return [s.units[0] for s in self.passed if unit in s.origins and microbatch in s.microbatches]

    def wait(self, timeout: float) -> Sequence[Reply]:
        self.now += timeout
        self.turns += 1
        assert self.turns < 3000, "nothing happens any more"
        if not self.queue:
            return []
        worker, call = self.queue.pop(self.chance.randrange(len(self.queue)))
        self.log.append((worker, call.kind, unit(call)))
        if call.shard is None:
            return [Reply(worker=worker, receipt=receipt_of(worker, HERE))]
        if self.losses and self.chance.random() < 0.15:
            self.losses -= 1
            self.waiting.pop(worker, None)
            cause = self.chance.choice([Cause.NODE, Cause.NODE, Cause.PROCESS])
            if cause is Cause.NODE:
                self.gone.add(worker)
            return [Reply(worker=worker, lost=(cause, "scripted"))]
        if call.kind is CallKind.RUN and not self.arrived(call):
            return [Reply(worker=worker)]
        return [self.answered(worker, call, call.shard)]

    def arrived(self, call: Call) -> bool:
        """Whether what a step was handed can be read; it is what its source has put out."""
        assert call.shard is not None
        ends = {shard.units[-1] for shard in self.passed if call.microbatch in shard.microbatches}
        origins = [origin for origin in call.shard.origins if origin in ends]
        if not origins:
            assert call.arriving is None
            return True
        (origin,) = origins
        if isinstance(call.arriving, Output):
            assert (call.arriving.unit, call.arriving.microbatch) == (origin, call.microbatch)
            return call.arriving.worker not in self.gone
        if call.arriving is None:
            assert origin in self.recorded, "where it is must be known, or recorded"
        else:
            assert call.arriving.key == f"{origin}/{call.microbatch}"
        return True

    def answered(self, worker: str, call: Call, shard: Shard) -> Reply:
        last = shard.units[-1]
        if call.kind is CallKind.PREFETCH:
            assert worker not in self.waiting, "only a worker that holds nothing reads ahead by itself"
            return Reply(worker=worker, receipt=receipt_of(worker))
        if call.kind is CallKind.FINISH:
            self.waiting.pop(worker, None)
            self.recorded.add(last)
            return Reply(worker=worker, receipt=receipt_of(worker))
        for origin in shard.origins:
            self.read.add((origin, shard.units[0], call.microbatch))
        if call.microbatch == shard.microbatches[0]:
            self.waiting[worker] = []
        waiting = self.waiting[worker]
        waiting.append(call.microbatch)
        written = [m for m in waiting if self.chance.random() < self.stored]
        self.waiting[worker] = [m for m in waiting if m not in written]
        output = Output(last, call.microbatch, worker)
        self.outputs[last, call.microbatch] = weakref.ref(output)
        stored = {m: Artifact(key=f"{last}/{m}", size=self.size, sha256="") for m in written}
        receipt = Receipt(worker=worker, started=0.0, seconds=1.0, peak_bytes=1, stored=stored)
        return Reply(worker=worker, receipt=receipt, output=output)


def once(*losses: tuple[CallKind, int, Cause]) -> Callable[[str, Call], Cause | None]:
    """Each (kind, unit) is lost the first time it is tried."""
    left = {(kind, unit): cause for kind, unit, cause in losses}
    return lambda _, call: left.pop((call.kind, call.shard.units[0]), None) if call.shard else None


def test_a_lost_worker_is_replaced_and_only_its_shard_is_run_again() -> None:
    workers = Scripted(once((CallKind.FINISH, 1, Cause.PROCESS)))
    driver, events = controller(workers)
    driver.run_pass(shards(3))
    runs = [unit for _, kind, unit in workers.log if kind is CallKind.RUN]
    assert [runs.count(unit) for unit in range(4)] == [3, 6, 3, 3]
    lost = [event for event in events if isinstance(event, WorkerLost)]
    assert [(event.cause, event.shard) for event in lost] == [("its process died", "forward 0001")]
    assert {name for name, kind, _ in workers.log if kind is CallKind.SETUP} == {"worker-0", "worker-1", "worker-2"}


@pytest.mark.parametrize("stage", PASSES)
def test_a_shard_reads_from_another_only_the_microbatches_that_both_take(stage: Stage) -> None:
    passed = whole_pass(SEEING, stage)
    for shard, sources in zip(passed, sources_of(passed), strict=True):
        expected = {
            microbatch: index
            for microbatch in shard.microbatches
            for index, source in enumerate(passed)
            if source.units[-1] in shard.origins and microbatch in source.microbatches
        }
        assert sources == expected
    readers = Counter(source for sources in sources_of(passed) for source in sources.values())
    assert (max(readers.values()) > 3) is (stage is Stage.FORWARD), "draft and head read one block"


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**31),
    stage=st.sampled_from(PASSES),
    limit=st.integers(1, 2),
    workers=st.integers(1, 4),
    losses=st.integers(0, 8),
    stored=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_step_is_handed_what_its_source_put_out_whatever_is_lost(
    seed: int, stage: Stage, limit: int, workers: int, losses: int, stored: float
) -> None:
    passed = whole_pass(SEEING, stage, limit)
    cluster = Handing(passed, seed, losses, stored)
    driver, events = controller(cluster, workers, recovery=Recovery(per_shard=99, starting=99))
    driver.run_pass(passed)
    finished = [event.shard for event in events if event.event == "shard"]
    assert sorted(finished) == sorted(shard.name for shard in passed)


@pytest.mark.parametrize("stage", PASSES)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_output_is_let_go_of_once_it_is_stored_and_all_have_read_it(stage: Stage, workers: int) -> None:
    passed = whole_pass(SEEING, stage)
    held: Counter[bool] = Counter()

    class Watching(Handing):
        def wait(self, timeout: float) -> Sequence[Reply]:
            for (unit_, microbatch), output in self.outputs.items():
                readers = self.readers(unit_, microbatch)
                unread = [reader for reader in readers if (unit_, reader, microbatch) not in self.read]
                if readers:
                    assert (output() is not None) is bool(unread), (unit_, microbatch, readers)
                    held[bool(unread)] += 1
            return super().wait(timeout)

    cluster = Watching(passed, 0, stored=1.0)
    driver, _ = controller(cluster, workers)
    driver.run_pass(passed)
    assert held[True] > 5
    assert held[False] > 5


@pytest.mark.parametrize("workers", [1, 2])
def test_what_waits_for_a_shard_that_nobody_has_taken_is_of_bounded_size(workers: int) -> None:
    passed = whole_pass(PassGraph(decoder=3, texts=20), Stage.FORWARD)
    most = 0

    class Watching(Handing):
        size = WAITING_BYTES // 8

        def wait(self, timeout: float) -> Sequence[Reply]:
            nonlocal most
            for shard in passed:
                waiting = [output() for (unit_, _), output in self.outputs.items() if unit_ == shard.units[-1]]
                most = max(most, sum(each is not None for each in waiting))
            return super().wait(timeout)

    driver, _ = controller(Watching(passed, 0, stored=1.0), workers)
    driver.run_pass(passed)
    # The last to arrive is not yet known to be stored.
    assert most <= 9
    assert workers == 2 or most >= 8


def test_what_a_lost_node_had_put_out_is_read_from_the_store_once_its_shard_is_finished() -> None:
    # Shard 0 was finished on worker-0, whose node takes the output with it before shard 1 has read it.
    passed = whole_pass(PassGraph(decoder=1, texts=1), Stage.FORWARD)
    handed: list[Any] = []

    class Leaving(Handing):
        def arrived(self, call: Call) -> bool:
            if unit(call) == 0:
                assert self.recorded == {"entry"}
                handed.append(call.arriving)
                self.gone.add("worker-0")
            return super().arrived(call)

    cluster = Leaving(passed, 0, stored=0.0)
    driver, _ = controller(cluster, wanted=1)
    driver.run_pass(passed)
    assert [type(found) for found in handed] == [Output, type(None)]


def test_a_call_that_hangs_costs_the_worker() -> None:
    hung: list[Call] = []

    def script(worker: str, call: Call) -> Any:
        if call.kind is CallKind.FINISH and (not hung or call in hung):
            hung.append(call)
            return "hang" if worker in ("worker-0", "worker-1") and len(set(map(id, hung))) == 1 else None
        return None

    workers = Scripted(script)
    driver, events = controller(workers, wanted=1)
    driver.run_pass(shards(1)[:1])
    assert [event.cause for event in events if event.event == "lost"] == ["it did not answer in time"]


def test_a_worker_without_replacement_gives_its_shard_up_for_one_that_blocks_all() -> None:
    # Two workers, no room for a third: worker-0 dies in shard 0 while worker-1 holds shard 1 and waits for it.
    tried: list[Call] = []

    def script(worker: str, call: Call) -> Any:
        if worker == "worker-0" and call.kind is CallKind.RUN and call.microbatch == 1:
            tried.append(call)
            return Cause.NODE
        return None

    workers = Scripted(script, room=2)
    driver, events = controller(workers, patience=30.0)
    driver.run_pass(shards(3))
    assert len(tried) == 1
    assert [event.worker for event in events if event.event == "yielded"] == ["worker-1"]
    finished = [event.units[0] for event in events if event.event == "shard"]
    assert finished == ["0000", "0001", "0002", "0003"]


def test_a_shard_that_kills_three_workers_ends_the_run_by_name() -> None:
    workers = Scripted(lambda _, call: Cause.MEMORY if unit(call) == 2 and call.kind is CallKind.FINISH else None)
    driver, _ = controller(workers)
    with pytest.raises(ResourceError, match=r"forward 0002 lost 3 workers, the last because its node ran out of memor"):
        driver.run_pass(shards(2))


def test_lost_nodes_are_not_held_against_a_shard() -> None:
    left = [Cause.NODE] * 6
    workers = Scripted(lambda _, call: left.pop() if left and call.kind is CallKind.FINISH else None)
    driver, events = controller(workers)
    driver.run_pass(shards(2))
    assert len([event for event in events if event.event == "lost"]) == 6


def test_a_cluster_where_workers_cannot_start_ends_the_run() -> None:
    workers = Scripted(lambda *_: Cause.PROCESS)
    driver, _ = controller(workers, first=1000.0)
    with pytest.raises(ResourceError, match="5 workers in a row were lost while they started"):
        driver.wait_for_first()
    with pytest.raises(ResourceError, match="no worker could be started in 60 s; the cluster has 0 GPUs and 2 CPUs"):
        controller(Scripted(room=0))[0].wait_for_first()


def test_a_cluster_that_is_gone_in_the_middle_ends_the_run() -> None:
    workers = Scripted(lambda _, call: Cause.NODE if unit(call) == 1 else None, room=1)
    driver, _ = controller(workers, wanted=1)
    with pytest.raises(ResourceError, match="no worker is left and none could be started in 60 s"):
        driver.run_pass(shards(2))


def test_what_a_worker_reports_rises_as_it_is() -> None:
    failure = Failure.of(DamagedError("forward/0001/x is damaged", "forward/0001/x"))
    workers = Scripted(lambda worker, call: receipt_of(worker, failure=failure) if unit(call) == 1 else None)
    driver, _ = controller(workers)
    with pytest.raises(DamagedError, match="is damaged") as caught:
        driver.run_pass(shards(2))
    assert caught.value.key == "forward/0001/x"
    workers.script = lambda *_: None
    driver.abandon()
    driver.run_pass(shards(2))
    assert ("worker-0", CallKind.DROP, None) in workers.log


def test_another_version_on_a_worker_is_refused() -> None:
    workers = Scripted(lambda worker, _: receipt_of(worker, replace(HERE, version="0.0.1")))
    with pytest.raises(ResourceError, match=r"a worker on here has prismaquant-ray 0\.0\.1, the driver "):
        controller(workers)[0].wait_for_first()


def test_a_worker_that_may_not_join_ends_the_run() -> None:
    def refuse(machine: Machine) -> None:
        raise InputError("another device")

    with pytest.raises(InputError, match="another device"):
        controller(Scripted(), admit=refuse)[0].wait_for_first()


def test_the_verdict_counts_each_kind_of_loss_by_itself() -> None:
    def loss(cause: Cause, shard: str | None = "a", ready: bool = True) -> LostWorker:
        return LostWorker(worker="w", cause=cause, shard=shard, was_ready=ready)

    def verdict(*losses: LostWorker, ready: int = 1) -> str | None:
        return Recovery(per_shard=2, starting=2, nodes=3).verdict(losses, ready=ready)

    assert verdict(loss(Cause.PROCESS)) is None
    assert verdict(loss(Cause.PROCESS), loss(Cause.PROCESS, "b")) is None
    assert verdict(loss(Cause.PROCESS), loss(Cause.NODE), loss(Cause.TIMEOUT)) is not None
    assert verdict(loss(Cause.STORAGE), loss(Cause.STORAGE)) is not None
    assert verdict(*[loss(Cause.PROCESS, None, False)] * 2) is not None
    assert verdict(loss(Cause.PROCESS, None), loss(Cause.PROCESS, None)) is None
    assert verdict(*[loss(Cause.NODE)] * 3) is not None
    assert verdict(*[loss(Cause.STORAGE, None, False)] * 9) is None
    assert verdict(*[loss(Cause.STORAGE, None, False)] * 2, ready=0) is not None


def test_whoever_holds_the_last_shard_gives_way_and_only_to_an_earlier_one() -> None:
    assert yielding({"a": 3, "b": 5}, [2]) == "b"
    assert yielding({"a": 1}, [2]) is None
    assert yielding({}, [0]) is None
    assert yielding({"a": 1}, []) is None


def test_the_driver_plans_and_listens_without_torch() -> None:
    """`status` and the controller load nothing that takes seconds to import."""
    modules = "actors.controller, prismaquant_ray.events, jobs.commands.progress, jobs.pipeline.status"
    code = f"import sys, {modules}; print([name for name in ('ray', 'torch', 'transformers') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
