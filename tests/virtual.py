"""Workers on a virtual clock behind the controller that runs use: a pass of any size takes no time but the driver's."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from actors.controller import Controller
from actors.deadlines import Deadlines
from actors.messages import Receipt
from actors.protocol import Call, CallKind, Reply
from actors.schedule.shards import Work
from actors.schedule.units import PASSES, Exit, Shard
from benchmarks.simulation import Durations
from prismaquant_ray import __version__
from prismaquant_ray.events import Event, Events, Listener, Machine, PassBegan, RunBegan, RunEnded, StepDone

HERE = Machine(version=__version__, pid=1, host="here", device="cpu", free_bytes=0, host_bytes=0)


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
    controller = _controller(virtual, Events(log.append), workers)
    controller.run_pass(shards)
    return virtual.now, [event for event in log if isinstance(event, StepDone)]


def conducted_run(work: Work, durations: Durations, workers: int, listener: Listener) -> None:
    """Both passes, with all that the driver of a run says of them; its clock is that of the workers."""
    virtual = VirtualWorkers(durations)
    events = Events(lambda event: listener(replace(event, at=virtual.now)))
    events(RunBegan(workers=workers))
    controller = _controller(virtual, events, workers)
    for stage in PASSES:
        shards = work.of(stage)
        events(
            PassBegan(
                stage=str(stage),
                shards=len(shards),
                units=sum(len(shard.units) for shard in shards),
                produced=sum(len(shard.produce) for shard in shards),
                microbatches=max(len(shard.microbatches) for shard in shards),
                steps=sum(len(shard.microbatches) + 1 for shard in shards),
            )
        )
        controller.run_pass(shards)
    events(RunEnded(how="measured"))


def _controller(virtual: VirtualWorkers, events: Events, workers: int) -> Controller:
    never = Deadlines(1e9)
    controller = Controller(virtual, events, wanted=workers, first=1e9, deadlines=never, clock=virtual.clock)
    controller.wait_for_first()
    return controller
