"""A shard while a worker holds it: its units are loaded, run by microbatch, and their products stored.

`ShardTask` moves and commits data; a `UnitTask` computes: one class for each kind of unit in each pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import Tensor

from actors.context import WorkerContext
from actors.schedule.units import Shard, Stage, Unit, unit_key
from actors.transfer import Activation, Inbox, Outbox, from_wire, read_boundary, to_wire
from prismaquant_ray.events import StepMetrics
from prismaquant_ray.formats import FormatName
from prismaquant_ray.records import tensors_key
from prismaquant_ray.storage.record import Artifact, Record, new_attempt, write_tensors

#: Waits until a unit's product is stored; its record.
Stored = Callable[[], Record]


def made(record: Record) -> Stored:
    """A record whose product is stored."""
    return lambda: record


class Attempt:
    """One attempt at a shard, as its unit task sees it: inputs from the run store, keys that no other attempt uses.

    `resident` holds modules that stay loaded until the shard closes. `loss` is an exit's loss of a microbatch, in nats.
    """

    def __init__(self, context: WorkerContext, shard: Shard) -> None:
        self.context = context
        self.shard = shard
        self.name = new_attempt()
        self.resident = ExitStack()
        self.loss: float | None = None
        self.read_bytes = 0
        self.written_bytes = 0

    def formats(self, unit: Unit) -> tuple[FormatName, ...]:
        """The formats a block is encoded or priced in; none for one that is only run."""
        return self.context.config.formats if unit in self.shard.produce else ()

    @property
    def producing(self) -> list[Unit]:
        """The units that must produce something, in order."""
        return [unit for unit in self.shard.units if unit in self.shard.produce]

    def inbox(self, stage: Stage, *units: Unit) -> Inbox:
        """The stored boundaries of some units of a pass, for the microbatches of this shard."""
        run_store, graph = self.context.run_store, self.context.graph

        def find(microbatch: int) -> dict[int, Artifact]:
            return run_store.boundary(stage, next(unit for unit in units if microbatch in graph.microbatches(unit)))

        microbatches, device = self.shard.microbatches, self.context.runner.device
        return Inbox(run_store.store, self.context.threads, find, microbatches, device)

    def receive(self, inbox: Inbox, microbatch: int) -> Tensor:
        """A stored boundary on the worker's device."""
        return self.received(*inbox.get(microbatch))

    def received(self, boundary: Tensor, size: int) -> Tensor:
        """A boundary that was read, whose bytes count."""
        self.read_bytes += size
        return boundary

    def write(self, unit: Unit, name: str, tensors: Mapping[str, Tensor]) -> Artifact:
        """Store tensors of a unit's product."""
        key = tensors_key(self.shard.stage, unit_key(unit), self.name, name)
        return write_tensors(self.context.run_store.store, key, tensors)


class UnitTask(ABC):
    """The work of one kind of units in one pass. Microbatches come in order, then `products`, then `close`."""

    #: Whether anything reads the output of the last unit.
    is_read: ClassVar[bool] = True

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.context = attempt.context

    @abstractmethod
    def load(self) -> None:
        """Load the units."""

    @abstractmethod
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        """The output of the last unit; empty where nothing reads it."""

    def products(self) -> Iterator[tuple[Unit, Stored]]:
        """Each unit that must produce something, its weights released, and what waits for its data to be stored."""
        return iter(())

    def close(self) -> None:  # noqa: B027 - optional: `attempt.resident` closes itself
        """Release weights other than those in `attempt.resident`."""


class ShardTask:
    """A loaded shard. Microbatches must come in order, then `finish`; `close` releases the weights."""

    def __init__(self, attempt: Attempt, task: UnitTask) -> None:
        self.attempt = attempt
        self.task = task
        self.context = attempt.context
        self.shard = attempt.shard
        self.outbox = Outbox(self.context.run_store.store, self.context.threads)
        self.reported: set[int] = set()
        self.arrivals = attempt.inbox(self.shard.stage, *self.shard.origins)
        task.load()

    def run(self, microbatch: int, arriving: Activation | Artifact | None) -> tuple[Activation, StepMetrics]:
        """One microbatch, with its metrics; the boundary is stored in the background."""
        leaving = self.task.step(microbatch, self._arriving(microbatch, arriving)).detach().cpu().contiguous()
        self.context.runner.checks.settle()
        if self.task.is_read:
            name = f"boundary-{microbatch:05d}"
            key = tensors_key(self.shard.stage, unit_key(self.shard.units[-1]), self.attempt.name, name)
            self.outbox.put(microbatch, key, leaving)
        wire = to_wire(leaving)
        hop = arriving[1].nbytes if isinstance(arriving, tuple) else 0
        tokens = self.context.batches[microbatch].tokens.numel()
        return wire, StepMetrics(tokens=tokens, hop_bytes=hop, loss=self.attempt.loss)

    def stored(self) -> dict[int, Artifact]:
        """Boundaries that have reached the store since the last call."""
        fresh = {m: artifact for m, artifact in self.outbox.completed().items() if m not in self.reported}
        self.reported |= fresh.keys()
        return fresh

    def finish(self) -> None:
        """Commit the boundary, then each unit's record, so that an interruption leaves only complete records."""
        attempt, run_store = self.attempt, self.context.run_store
        if self.task.is_read:
            boundary = self.outbox.flush()
            run_store.write_boundary(self.shard.stage, self.shard.units[-1], boundary)
            attempt.written_bytes += sum(artifact.size for artifact in boundary.values())
        last: tuple[Unit, Stored] | None = None
        try:
            for product in self.task.products():
                # One unit is stored while the next one is made: its data is in memory.
                if last is not None:
                    self._commit(*last)
                last = product
        finally:
            if last is not None:
                self._commit(*last)
        self.close()

    def _commit(self, unit: Unit, stored: Stored) -> None:
        record = stored()
        self.attempt.written_bytes += sum(artifact.size for artifact in record.artifacts.values())
        self.context.run_store.write_record(self.shard.stage, unit, record)

    def close(self) -> None:
        """Release all weights, and what an interrupted step left to check."""
        self.context.runner.checks.clear()
        self.task.close()
        self.attempt.resident.close()

    def _arriving(self, microbatch: int, arriving: Activation | Artifact | None) -> Tensor:
        # The entry reads the merger's features for images, and nothing but tokens for text.
        is_text = self.shard.units[0] == "entry" and not self.context.graph.has_image(microbatch)
        if is_text or not self.shard.origins:
            return torch.empty(0)
        if isinstance(arriving, tuple):
            return from_wire(arriving, self.context.runner.device)
        if isinstance(arriving, Artifact):
            return self.attempt.received(
                *read_boundary(self.context.run_store.store, arriving, self.context.runner.device)
            )
        return self.attempt.receive(self.arrivals, microbatch)
