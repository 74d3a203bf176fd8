"""Claims about the loss of whole nodes in passes of up to 64 workers: what is repeated, and what the log says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.protocol import Call, CallKind, Reply
from actors.schedule.pass_graph import PassGraph
from actors.schedule.recovery import Cause, Recovery
from actors.schedule.units import PASSES, Shard, Stage
from prismaquant_ray.attempts import pass_attempts
from prismaquant_ray.event_log import EventLog, RunningSteps, steps_by_shard
from prismaquant_ray.events import (
    Event,
    PassBegan,
    ShardDone,
    ShardYielded,
    StepDone,
    StepMetrics,
    WorkerLost,
    read_events,
)
from prismaquant_ray.storage.store import Store
from tests.actors.test_controller import HERE, Handing, controller, receipt_of, whole_pass

BEGAN = PassBegan(at=1000.0, stage="forward", shards=1, units=1, produced=1, microbatches=1, steps=1)
#: More than any run here can lose.
RECOVERY = Recovery(per_shard=10**6, starting=10**6, nodes=10**6)


class Nodes(Handing):
    """Workers on nodes of several, which are lost with all that lies there; `again` brings another node for each."""

    def __init__(
        self, passed: Sequence[Shard], seed: int, *, each: int, losses: int, again: bool, stored: float = 0.5
    ) -> None:
        super().__init__(passed, seed, stored=stored)
        self.each, self.again = each, again
        self.nodes: list[list[str]] = []
        steps = sum(len(shard.microbatches) + 1 for shard in passed)
        self.moments = {self.chance.randrange(1, steps + 1) for _ in range(losses)}
        self.most = 200 * (steps + 100) * (losses + 1)

    def start(self, worker: str) -> None:
        place = next((node for node in self.nodes if len(node) < self.each), None)
        if place is None:
            if self.gone and not self.again:
                self.pending.append(worker)
                return
            self.nodes.append(place := [])
        place.append(worker)
        super().start(worker)

    def lose_a_node(self) -> None:
        if len(self.nodes) > (0 if self.again else 1):
            node = self.nodes.pop(self.chance.randrange(len(self.nodes)))
            self.gone.update(node)

    def wait(self, timeout: float) -> Sequence[Reply]:
        self.now += timeout
        self.turns += 1
        assert self.turns < self.most, "nothing happens any more"
        if self.turns in self.moments:
            self.lose_a_node()
        if not self.queue:
            return []
        dead = [place for place, (worker, _) in enumerate(self.queue) if worker in self.gone]
        worker, call = self.queue.pop(dead[0] if dead else self.chance.randrange(len(self.queue)))
        if dead:
            self.waiting.pop(worker, None)
            return [Reply(worker=worker, lost=(Cause.NODE, "scripted"))]
        if call.shard is None:
            if call.kind is CallKind.DROP:
                self.waiting.pop(worker, None)
            return [Reply(worker=worker, receipt=receipt_of(worker, HERE))]
        if call.kind is CallKind.RUN and not self.arrived(call):
            return [Reply(worker=worker)]
        return [self.answered(worker, call, call.shard)]

    def answered(self, worker: str, call: Call, shard: Shard) -> Reply:
        reply = super().answered(worker, call, shard)
        assert reply.receipt is not None
        drawn = self.chance.randrange
        metrics = StepMetrics(tokens=drawn(9), hop_bytes=drawn(9))
        if call.kind is CallKind.FINISH:
            metrics = StepMetrics(read_bytes=drawn(9), written_bytes=drawn(9))
        receipt = replace(reply.receipt, started=float(self.turns), peak_bytes=drawn(99), metrics=metrics)
        return replace(reply, receipt=receipt)


def driven(cluster: Nodes, workers: int) -> list[Event]:
    driver, events = controller(cluster, workers, recovery=RECOVERY, first=1e9)
    driver.run_pass(cluster.passed)
    return events


SHAPE = {
    "seed": st.integers(0, 2**31),
    "stage": st.sampled_from(PASSES),
    "blocks": st.integers(1, 80),
    "microbatches": st.integers(1, 6),
    "limit": st.integers(1, 3),
    "workers": st.integers(1, 64),
    "each": st.integers(1, 8),
    "losses": st.integers(0, 8),
    "again": st.booleans(),
    "stored": st.sampled_from([0.0, 0.5, 1.0]),
}


@settings(max_examples=60, deadline=None)
@given(**SHAPE)
def test_between_two_losses_no_worker_repeats_more_than_one_shard(
    seed: int,
    stage: Stage,
    blocks: int,
    microbatches: int,
    limit: int,
    workers: int,
    each: int,
    losses: int,
    again: bool,
    stored: float,
) -> None:
    passed = whole_pass(PassGraph(decoder=blocks, texts=microbatches), stage, limit)
    cluster = Nodes(passed, seed, each=each, losses=losses, again=again, stored=stored)
    events = driven(cluster, workers)
    finished = [event.shard for event in events if isinstance(event, ShardDone)]
    assert sorted(finished) == sorted(shard.name for shard in passed), "the pass ends, every shard once"
    let_go = [event for event in events if isinstance(event, WorkerLost | ShardYielded) and event.shard is not None]
    interrupted = [work for work in steps_by_shard(events) if work.microbatch is not None]
    # Steps were repeated because a worker let go of a shard, which was lost or had to yield, and for nothing else.
    steps = Counter((event.shard, event.microbatch) for event in events if isinstance(event, StepDone))
    assert set(steps.values()) <= set(range(1, len(let_go) + 2))
    assert sum(steps.values()) - len(steps) == sum(work.steps for work in interrupted)
    assert len(interrupted) <= len(let_go)
    # Who yields does so for a shard that was lost, and once.
    assert all(most <= 1 for most in yields_between_losses(events))
    lost = sum(isinstance(event, WorkerLost) for event in let_go)
    assert len(let_go) - lost <= lost


@pytest.mark.parametrize("again", [True, False])
def test_of_64_workers_those_of_lost_nodes_cost_a_shard_each(again: bool) -> None:
    microbatches = 16
    passed = whole_pass(PassGraph(decoder=150, texts=microbatches), Stage.FORWARD)
    cluster = Nodes(passed, 1, each=8, losses=4, again=again)
    events = driven(cluster, 64)
    lost = [event for event in events if isinstance(event, WorkerLost)]
    yielded = [event for event in events if isinstance(event, ShardYielded)]
    repeated = sum(isinstance(event, StepDone) for event in events) - sum(len(s.microbatches) + 1 for s in passed)
    assert len(lost) == 4 * 8
    assert bool(yielded) is not again, "without other nodes somebody must make room for what was lost"
    assert len(yielded) <= len(lost)
    assert 0 < repeated <= microbatches * (len(lost) + len(yielded))


def yields_between_losses(events: Sequence[Event]) -> list[int]:
    """How often the same worker yielded at most, between each two events of a loss."""
    counts = [Counter[str]()]
    for event in events:
        if isinstance(event, WorkerLost):
            counts.append(Counter())
        if isinstance(event, ShardYielded):
            counts[-1][event.worker] += 1
    return [max(count.values(), default=0) for count in counts]


@settings(max_examples=40, deadline=None)
@given(**{**SHAPE, "blocks": st.integers(1, 20), "workers": st.integers(1, 8), "again": st.just(True)})
def test_the_log_says_of_a_pass_what_its_steps_said(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    stage: Stage,
    blocks: int,
    microbatches: int,
    limit: int,
    workers: int,
    each: int,
    losses: int,
    again: bool,
    stored: float,
) -> None:
    passed = whole_pass(PassGraph(decoder=blocks, texts=microbatches), stage, limit)
    cluster = Nodes(passed, seed, each=each, losses=losses, again=again, stored=stored)
    told = [BEGAN, *(replace(event, at=BEGAN.at + place) for place, event in enumerate(driven(cluster, workers), 1))]
    store = Store(tmp_path_factory.mktemp("log"))
    log = EventLog(store)
    for place, event in enumerate(told):
        log(event)
        if place % 7 == 0:
            log.flush()
            # The next driver goes on where this one was killed.
            log = EventLog(store) if place % 3 == 0 and not open_shards(told[: place + 1]) else log
    log.flush()
    (found,) = pass_attempts(read_events(store))
    steps = [event for event in told if isinstance(event, StepDone)]
    assert found.began == BEGAN
    assert list(found.shards) == [event for event in told if isinstance(event, ShardDone)]
    assert sum(work.steps for work in found.work) == len(steps)
    assert found.token_blocks == sum((step.tokens or 0) * step.units for step in steps)
    moved = {kind: sum(getattr(step, f"{kind}_bytes") or 0 for step in steps) for kind in ("hop", "read", "written")}
    assert found.moved() == moved
    assert found.seconds == max(step.at for step in steps) - BEGAN.at
    assert log.peak_bytes == max(step.peak_bytes for step in steps)
    assert sum(work.seconds for work in found.work) == pytest.approx(sum(step.seconds for step in steps))
    last = {step.worker: (step.shard, step.microbatch) for step in steps}
    assert {work.worker: (work.shard, work.microbatch) for work in sorted(found.work, key=lambda w: w.at)} == last


def open_shards(events: Sequence[Event]) -> bool:
    """Whether a worker holds a shard."""
    running = RunningSteps()
    for event in events:
        running.take(event)
    return bool(running.steps)
