"""Driving a pass over workers that may be lost: hands out steps, takes receipts, replaces lost workers.

Decisions come from `schedule.ring` (assignment of steps) and `schedule.recovery` (whether to go on); actions go through
`Workers`, which is Ray in a run and plain objects in tests. Nothing here imports Ray.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from actors.deadlines import Deadlines
from actors.flights import Flight, Flights
from actors.messages import Failure, Receipt, check_version
from actors.pass_state import PassState
from actors.protocol import Call, CallKind, Reply, Workers
from actors.schedule.recovery import Cause, LostWorker, Recovery, yielding
from actors.schedule.ring import FINISH, Step
from actors.schedule.units import Shard, unit_key
from prismaquant_ray.errors import ResourceError, StoreError
from prismaquant_ray.events import (
    Events,
    Machine,
    Notice,
    Preflighted,
    ShardDone,
    ShardYielded,
    StepDone,
    WorkerLost,
    WorkerReady,
)

if TYPE_CHECKING:
    from prismaquant_ray.storage.record import Artifact


# Seconds for which a worker reads what another one puts out from the store, after it could not fetch it from there.
_APART = 300.0


class Controller:
    """Workers of one run, over any number of passes.

    `wanted` workers are asked for at once; work begins with the first that is ready. `setup` is the argument of a
    worker's SETUP call by its name. Times are in seconds: the first worker must be ready after `first`, and a stalled
    pass waits `patience` for a replacement before a worker must give up its shard. `check` is called often, `admit`
    with the machine of every worker that is ready; either may raise to end the run. `is_reachable` tells whether the
    driver itself can read the store, when a worker cannot.
    """

    def __init__(
        self,
        workers: Workers,
        events: Events,
        *,
        wanted: int,
        first: float,
        deadlines: Deadlines,
        patience: float = 15.0,
        recovery: Recovery = Recovery(),  # noqa: B008 - frozen
        check: Callable[[], None] = lambda: None,
        admit: Callable[[Machine], None] = lambda _: None,
        is_reachable: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workers = workers
        self.events = events
        self.first = first
        self.patience = patience
        self.recovery = recovery
        self.check = check
        self.admit = admit
        self.is_reachable = is_reachable
        self.clock = clock
        self.ready: dict[str, Machine] = {}
        self.losses: list[LostWorker] = []
        self._flying = Flights(deadlines, clock)
        self._due: list[tuple[float, str]] = []
        self._started = 0
        self._stalled_since: float | None = None
        # Until when a worker, the first, fetches nothing from another one.
        self._apart: dict[tuple[str, str], float] = {}
        self._preflown = False
        self._hosts: dict[str, str] = {}
        for _ in range(wanted):
            self._start()

    def wait_for_first(self) -> Machine:
        """The machine of the first worker that is ready; ResourceError when none comes in time."""
        begun = self.clock()
        while not self.ready:
            if self.clock() - begun > self.first:
                raise ResourceError(
                    f"no worker could be started in {self.first:.0f} s; {self.workers.describe()}. Lower what "
                    "cluster asks for, add nodes, or set cluster.wait for nodes that an autoscaler brings"
                )
            self._turn(None)
        return next(iter(self.ready.values()))

    def preflight(self) -> None:
        """Have one worker try a few tokens; raises what it runs into."""
        while not self._preflown:
            self.wait_for_first()
            trying = any(flight.call.kind is CallKind.PREFLIGHT for flight in self._flying)
            idle = self.ready.keys() - self._flying.workers
            if idle and not trying:
                self._send(min(idle), Call(kind=CallKind.PREFLIGHT))
            self._turn(None)

    def run_pass(self, shards: Sequence[Shard]) -> None:
        """Run the shards in order; raises the error that a worker reports, or ResourceError when workers keep dying."""
        state = PassState.of(shards)
        while not state.ring.finished:
            self._turn(state)

    def abandon(self) -> None:
        """After a pass that raised: wait for the calls in flight, then have every worker drop its shard."""
        while any(flight.call.shard is not None for flight in self._flying):
            self._stop_hung(None)
            for reply in self.workers.wait(0.5):
                flight = self._flying.end(reply.worker)
                if reply.lost is not None:
                    self._lost(None, reply.worker, *reply.lost)
                elif flight.step is None and reply.receipt is not None:
                    self._accept(None, reply, reply.receipt, flight)
        for worker in self.ready.keys() - self._flying.workers:
            self._send(worker, Call(kind=CallKind.DROP))

    # One turn -------------------------------------------------------------------------------------------------

    def _turn(self, state: PassState | None) -> None:
        self.check()
        now = self.clock()
        for entry in [entry for entry in self._due if entry[0] <= now]:
            self._due.remove(entry)
            self._send_start(entry[1])
        if state is not None:
            self._submit(state)
            self._unstall(state)
        self._stop_hung(state)
        for reply in self.workers.wait(0.5):
            self._handle(state, reply)
        if (waiting := self._flying.awaited(self._where)) is not None:
            self.events(waiting)

    def _submit(self, state: PassState) -> None:
        exhausted = False
        for worker in state.ring.order(self.ready.keys() - self._flying.workers):
            # If no shard can run on one idle worker, none can on the others.
            step = None if exhausted and worker not in state.ring.held else state.ring.next(worker)
            if step is None:
                if worker not in state.ring.held:
                    exhausted = True
                    if (following := self._following(state, worker)) is not None:
                        self._send(worker, Call(kind=CallKind.PREFETCH, shard=following))
                continue
            shard = state.shards[step.shard]
            if step.microbatch == FINISH:
                call = Call(kind=CallKind.FINISH, shard=shard, following=self._following(state, worker))
            else:
                if not self._can_arrive(state, step, worker):
                    continue
                before = state.ring.source(step)
                arriving = None if before is None else state.outputs[before].where
                call = Call(kind=CallKind.RUN, shard=shard, microbatch=step.microbatch, arriving=arriving)
            self._send(worker, call, step)

    def _can_arrive(self, state: PassState, step: Step, worker: str) -> bool:
        """Whether a worker can read what a step needs now; what it cannot fetch from its maker it reads once stored."""
        before = state.ring.source(step)
        if before is None:
            return True
        output = state.outputs[before]
        if output.reference is None or self.clock() > self._apart.get((worker, output.worker), -math.inf):
            return True
        self._unreadable(state, before)
        return state.outputs[before].artifact is not None or state.ring.is_finished(before.shard)

    def _following(self, state: PassState, worker: str) -> Shard | None:
        index = state.ring.prefetch(worker)
        return None if index is None else state.shards[index]

    def _send(self, worker: str, call: Call, step: Step | None = None) -> None:
        self._flying.begin(worker, call, step)
        self.workers.submit(worker, call)

    def _start(self, delay: float = 0.0) -> None:
        name = f"worker-{self._started}"
        self._started += 1
        if delay:
            self._due.append((self.clock() + delay, name))
        else:
            self._send_start(name)

    def _send_start(self, name: str) -> None:
        self._flying.begin(name, Call(kind=CallKind.HELLO))
        self.workers.start(name)

    # Replies -------------------------------------------------------------------------------------------------

    def _handle(self, state: PassState | None, reply: Reply) -> None:
        flight = self._flying.end(reply.worker)
        if reply.lost is not None:
            self._lost(state, reply.worker, *reply.lost)
        elif reply.receipt is None:
            assert state is not None
            self._not_read(state, reply.worker, flight)
        else:
            self._flying.answered(flight)
            self._accept(state, reply, reply.receipt, flight)

    def _accept(self, state: PassState | None, reply: Reply, receipt: Receipt, flight: Flight) -> None:
        worker = reply.worker
        if receipt.failure is not None:
            self._failed(state, worker, receipt.failure)
        elif flight.call.kind is CallKind.HELLO:
            self._hosts[worker] = check_version(receipt).host
            self._send(worker, Call(kind=CallKind.SETUP))
        elif flight.call.kind is CallKind.SETUP:
            assert receipt.machine is not None
            self.admit(receipt.machine)
            self.ready[worker] = receipt.machine
            self.events(WorkerReady(worker=worker, **asdict(receipt.machine)))
        elif receipt.preflight is not None:
            self._preflown, found = True, receipt.preflight
            self.events(
                Preflighted(
                    worker=worker,
                    tried=list(found.tried),
                    without_gradient=list(found.without_gradient),
                    seconds=round(found.seconds, 3),
                )
            )
        elif flight.step is not None:
            assert state is not None
            self._step_done(state, reply, receipt, flight.step)

    def _failed(self, state: PassState | None, worker: str, failure: Failure) -> None:
        """Raise what a worker reports; but storage that only it cannot reach loses it, not the run."""
        error = failure.error()
        if type(error) is not StoreError:
            raise error
        where = self._where(worker)
        if self._hosts.get(worker) == socket.gethostname() or not self.is_reachable():
            raise StoreError(f"{where}: {error}")
        self.workers.stop(worker)
        self._lost(state, worker, Cause.STORAGE, f"{where}: {error}")

    def _where(self, worker: str) -> str:
        """A worker and its host, if that is known."""
        return f"{worker} on {self._hosts[worker]}" if worker in self._hosts else worker

    def _step_done(self, state: PassState, reply: Reply, receipt: Receipt, step: Step) -> None:
        shard = state.shards[step.shard]
        if step.microbatch != FINISH:
            made = state.output(step)
            made.reference, made.worker = reply.output, reply.worker
        for microbatch, artifact in receipt.stored.items():
            self._is_stored(state, Step(step.shard, microbatch), artifact)
        state.ring.done(reply.worker, step)
        before = state.ring.source(step)
        if before is not None:
            # Once all have read it, only a restarted shard reads it again, and then from the store.
            read = state.outputs[before]
            read.unread.discard(step.shard)
            if not read.unread and read.artifact is not None:
                read.reference = None
        self.events(
            StepDone(
                stage=str(shard.stage),
                shard=shard.name,
                units=len(shard.units),
                microbatch=None if step.microbatch == FINISH else step.microbatch,
                worker=reply.worker,
                started=round(receipt.started, 4),
                seconds=round(receipt.seconds, 4),
                peak_bytes=receipt.peak_bytes,
                **asdict(receipt.metrics),
            )
        )
        if step.microbatch == FINISH:
            for microbatch, source in state.ring.sources[step.shard].items():
                output = Step(source, microbatch)
                state.outputs[output].unfinished.discard(step.shard)
                if not state.outputs[output].unfinished:
                    del state.outputs[output]
            self.events(
                ShardDone(
                    stage=str(shard.stage),
                    shard=shard.name,
                    units=[unit_key(unit) for unit in shard.units],
                    worker=reply.worker,
                    produced=len(shard.produce),
                    left=state.ring.unfinished,
                )
            )

    def _is_stored(self, state: PassState, step: Step, artifact: Artifact) -> None:
        output = state.output(step)
        output.artifact = artifact
        state.ring.appeared(step)
        held = state.ring.held.values()
        if not output.unread or (output.unread.isdisjoint(held) and state.waits_for_too_much(step.shard)):
            output.reference = None

    def _not_read(self, state: PassState, worker: str, flight: Flight) -> None:
        """An output could not be fetched: its node is lost, or out of this worker's reach."""
        assert flight.step is not None
        before = state.ring.source(flight.step)
        assert before is not None
        output = state.outputs[before]
        self._apart[worker, output.worker] = self.clock() + _APART
        if output.worker in self.ready:
            self.events(
                Notice(
                    message=f"{self._where(worker)} cannot fetch what {self._where(output.worker)} puts out; for "
                    f"{_APART:.0f} s it is read from the run store instead"
                )
            )
        # If it is not what was handed out, it was computed again meanwhile.
        if output.reference is flight.call.arriving:
            self._unreadable(state, before)

    def _unreadable(self, state: PassState, step: Step) -> None:
        """An output is read from the store from now on, once it is there.

        All outputs of a finished shard are, and named by its record, even if its worker died.
        """
        output = state.outputs[step]
        output.reference = None
        if output.artifact is None and not state.ring.is_finished(step.shard):
            state.ring.vanished(step)

    # Losses ---------------------------------------------------------------------------------------------------

    def _lost(self, state: PassState | None, worker: str, cause: Cause, message: str) -> None:
        was_ready = self.ready.pop(worker, None) is not None
        shard = self._release(state, worker)
        self.losses.append(LostWorker(worker=worker, cause=cause, shard=shard, message=message, was_ready=was_ready))
        self.events(WorkerLost(worker=worker, cause=str(cause), shard=shard, message=message))
        reason = self.recovery.verdict(self.losses, ready=len(self.ready))
        if reason is not None:
            raise ResourceError(f"{reason} ({message}); run the same command again to continue")
        in_a_row = 0
        for loss in reversed(self.losses):
            if loss.was_ready:
                break
            in_a_row += 1
        # A new worker can be placed on a node that is not yet known to be gone; give the cluster time to notice.
        self._start(delay=float(2**in_a_row) if in_a_row else 0.0)

    def _release(self, state: PassState | None, worker: str) -> str | None:
        """Free a worker's shard; those of its outputs that were not stored are lost."""
        index = state.ring.released(worker) if state is not None else None
        if state is None or index is None:
            return None
        for step, output in state.outputs.items():
            if step.shard == index:
                output.reference = None
                if output.artifact is None:
                    state.ring.vanished(step)
        return f"{state.shards[index].stage} {state.shards[index].name}"

    def _stop_hung(self, state: PassState | None) -> None:
        for worker, flight, limit in self._flying.overdue():
            where = self._where(worker)
            self.workers.stop(worker)
            self._flying.end(worker)
            self._lost(state, worker, Cause.TIMEOUT, f"{flight.call} on {where} took more than {limit:.0f} s")

    def _unstall(self, state: PassState) -> None:
        """When every worker waits for a free shard, have one yield its own after `patience` seconds."""
        working = self._flying.working(self.patience)
        worker = None if working else yielding(state.ring.held, state.ring.blocking())
        if worker is None:
            self._stalled_since = None if working or self.ready else self._without_workers_since()
            return
        now = self.clock()
        if self._stalled_since is None:
            self._stalled_since = now
        elif now - self._stalled_since >= self.patience:
            self._stalled_since = None
            shard = self._release(state, worker)
            self.events(ShardYielded(worker=worker, shard=shard))
            self._send(worker, Call(kind=CallKind.DROP))

    def _without_workers_since(self) -> float:
        """Since when no worker is left; ResourceError when that has lasted too long."""
        now = self.clock()
        since = now if self._stalled_since is None else self._stalled_since
        if now - since > self.first:
            raise ResourceError(
                f"no worker is left and none could be started in {self.first:.0f} s; {self.workers.describe()}. "
                "Run the same command again to continue"
            )
        return since
