"""A shard while a worker holds it: its loaded units, microbatch by microbatch, then what they leave behind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from actors.ledger import Ledger
from actors.messages import Activation, Exit, Shard, Stage, Unit, from_wire, to_wire, unit_key
from actors.shards import below
from actors.transfer import Inbox, Outbox, read_boundary
from prismaquant_ray.calibration.text import CalibrationSet
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.models.runner import ModelRunner
from prismaquant_ray.rounding.encode import Rounding
from prismaquant_ray.rounding.forward_pass import ForwardVisit
from prismaquant_ray.sensitivity.backward_pass import BackwardVisit
from prismaquant_ray.sensitivity.fisher import exit_gradient
from prismaquant_ray.storage.record import Artifact, Record, new_attempt, read_tensors, write_tensors


@dataclass(kw_only=True, slots=True, eq=False)
class Workshop:
    """What every visit of a worker uses. The head stays loaded from one exit to the next."""

    config: Config
    ledger: Ledger
    runner: ModelRunner
    calibration: CalibrationSet
    rounding: Rounding
    thread: ThreadPoolExecutor
    head: ExitStack | None = None

    @property
    def microbatches(self) -> tuple[slice, ...]:
        """The sequences of each microbatch."""
        return self.calibration.microbatches(self.config.calibration.microbatch)

    def inbox(self, shard: Shard, stage: Stage, units: tuple[Unit, ...]) -> Inbox:
        """What the units of a pass put out, for the microbatches of a shard."""
        store = self.ledger.store
        return Inbox(store, self.thread, lambda: self.ledger.boundary(stage, *units), shard.microbatches)

    def load_head(self) -> None:
        """Final norm and head, unless they are loaded."""
        if self.head is None:
            self.head = ExitStack()
            self.head.enter_context(self.runner.exit())

    def unload_head(self) -> None:
        """Make room for blocks."""
        if self.head is not None:
            self.head.close()
            self.head = None


class Visit(ABC):
    """One attempt at a shard. Microbatches must come in order, then `finish`; `close` gives the weights up."""

    def __init__(self, shop: Workshop, shard: Shard) -> None:
        self.shop = shop
        self.shard = shard
        self.attempt = new_attempt()
        self.resident = ExitStack()
        self.outbox = Outbox(shop.ledger.store, shop.thread)
        self.moved = {"read": 0, "written": 0}
        self.facts: dict[str, float] = {}
        self.reported: set[int] = set()
        self.arrivals = shop.inbox(shard, shard.stage, shard.origins)
        self.start()

    @abstractmethod
    def start(self) -> None:
        """Load the units."""

    @abstractmethod
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        """What leaves the last unit."""

    @abstractmethod
    def products(self) -> Iterator[tuple[Unit, Record]]:
        """The record of each unit that must produce something; its data is stored, and its weights are let go."""

    def run(self, microbatch: int, arriving: Activation | Artifact | None) -> tuple[Activation, dict[str, Any]]:
        """One microbatch; the boundary goes to the store behind what follows."""
        leaving = self.step(microbatch, self._arriving(microbatch, arriving)).detach().cpu().contiguous()
        key = f"{self._directory(self.shard.units[-1])}/boundary-{microbatch:05d}.safetensors"
        self.outbox.put(microbatch, key, leaving)
        wire = to_wire(leaving)
        hop = arriving[1].nbytes if isinstance(arriving, tuple) else 0
        return wire, {"tokens": leaving.shape[0] * leaving.shape[1], "hop_bytes": hop, **self.facts}

    def stored(self) -> dict[int, Artifact]:
        """Boundaries that have reached the store since the last call."""
        fresh = {m: artifact for m, artifact in self.outbox.completed().items() if m not in self.reported}
        self.reported |= fresh.keys()
        return fresh

    def finish(self) -> None:
        """Commit the boundary, then each unit's record: whatever is interrupted, what is recorded can be built on."""
        last = self.shard.units[-1]
        boundary = self.outbox.flush()
        self.shop.ledger.write_boundary(self.shard.stage, last, boundary)
        self.moved["written"] += sum(artifact.size for artifact in boundary.values())
        for unit, record in self.products():
            self.moved["written"] += sum(artifact.size for artifact in record.artifacts.values())
            self.shop.ledger.write_record(self.shard.stage, unit, record)
        self.close()

    def close(self) -> None:
        """Let go of what is loaded."""
        self.resident.close()

    def _arriving(self, microbatch: int, arriving: Activation | Artifact | None) -> Tensor:
        if not self.shard.origins:
            return torch.empty(0)
        if isinstance(arriving, tuple):
            return from_wire(arriving).to(self.shop.runner.device)
        found, size = (
            read_boundary(self.shop.ledger.store, arriving)
            if isinstance(arriving, Artifact)
            else self.arrivals.get(microbatch)
        )
        self.moved["read"] += size
        return found.to(self.shop.runner.device)

    def _directory(self, unit: Unit) -> str:
        return f"{self.shard.stage}/{unit_key(unit)}/{self.attempt}"

    def _write(self, unit: Unit, name: str, tensors: Mapping[str, Tensor]) -> Artifact:
        return write_tensors(self.shop.ledger.store, f"{self._directory(unit)}/{name}.safetensors", tensors)


class EntryVisit(Visit):
    """The embedding: token ids to hidden states. It produces nothing but its boundary."""

    @override
    def start(self) -> None:
        self.resident.enter_context(self.shop.runner.entry())

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        with torch.no_grad():
            return self.shop.runner.embed(self.shop.calibration.tokens[self.shop.microbatches[microbatch]])

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        return iter(())


class ExitVisit(Visit):
    """Final norm and head: hidden states to the gradient of the loss. It produces nothing but its boundary."""

    @override
    def start(self) -> None:
        self.shop.load_head()
        last = len(self.shop.runner.layout.blocks) - 1
        self.hidden = self.shop.inbox(self.shard, Stage.FORWARD, (last,))

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        config, rows = self.shop.config.calibration, self.shop.microbatches[microbatch]
        hidden, size = self.hidden.get(microbatch)
        self.moved["read"] += size
        gradient, loss = exit_gradient(
            self.shop.runner,
            hidden.to(self.shop.runner.device),
            self.shop.calibration.tokens[rows],
            labels=config.labels,
            seed=config.seed,
            first_sequence=rows.start,
        )
        if not math.isfinite(loss):
            raise InputError(
                f"the model's loss on calibration sequences {rows.start} to {rows.stop - 1} is {loss}; "
                "is the checkpoint intact?"
            )
        self.facts["loss"] = loss
        return gradient

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        return iter(())


_Core = TypeVar("_Core", ForwardVisit, BackwardVisit)


class BlocksVisit(Visit, Generic[_Core]):
    """Decoder blocks, each with the core's own visit; those that produce leave a record."""

    @override
    def start(self) -> None:
        self.blocks: dict[Unit, _Core] = {unit: self.load(_index(unit)) for unit in self.shard.units}
        self.moved["read"] += sum(visit.block.source_bytes for visit in self.blocks.values())

    @abstractmethod
    def load(self, index: int) -> _Core:
        """A block with its weights."""

    @abstractmethod
    def record(self, unit: Unit, visit: _Core) -> Record:
        """What a block produces, stored."""

    def formats(self, unit: Unit) -> tuple[FormatName, ...]:
        """The formats a block is encoded or priced in; none for one that is only run."""
        return self.shop.config.formats if unit in self.shard.produce else ()

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        for unit in self.shard.units:
            if unit in self.shard.produce:
                yield unit, self.record(unit, self.blocks.pop(unit))

    @override
    def close(self) -> None:
        self.blocks.clear()


class ForwardShard(BlocksVisit[ForwardVisit]):
    """Blocks of the forward pass: run, gather statistics, encode."""

    @override
    def load(self, index: int) -> ForwardVisit:
        return ForwardVisit(self.shop.runner, index, self.formats(index), self.shop.rounding)

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        held_out = self.shop.calibration.holdout[self.shop.microbatches[microbatch]]
        for visit in self.blocks.values():
            arriving = visit.run(arriving, held_out)
        return arriving

    @override
    def record(self, unit: Unit, visit: ForwardVisit) -> Record:
        candidates = visit.finish()
        artifacts = {str(name): self._write(unit, name, tensors) for name, tensors in candidates.tensors.items()}
        return Record(artifacts=artifacts, facts=candidates.figures)


class BackwardShard(BlocksVisit[BackwardVisit]):
    """Blocks of the backward pass: recomputed from the boundary below them, differentiated from the top, priced."""

    @override
    def start(self) -> None:
        super().start()
        self.hidden = self.shop.inbox(self.shard, Stage.FORWARD, (below(self.shard.units[-1]),))

    @override
    def load(self, index: int) -> BackwardVisit:
        formats = self.formats(index)
        return BackwardVisit(self.shop.runner, index, formats, self._candidates(index) if formats else {})

    def _candidates(self, unit: Unit) -> dict[FormatName, dict[str, Tensor]]:
        record = self.shop.ledger.record(Stage.FORWARD, unit)
        self.moved["read"] += sum(artifact.size for artifact in record.artifacts.values())
        return {FormatName(name): read_tensors(self.shop.ledger.store, a) for name, a in record.artifacts.items()}

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        hidden, size = self.hidden.get(microbatch)
        self.moved["read"] += size
        hidden = hidden.to(self.shop.runner.device)
        for visit in reversed(self.blocks.values()):
            hidden = visit.forward(hidden)
        for visit in self.blocks.values():
            arriving = visit.backward(arriving)
        return arriving

    @override
    def record(self, unit: Unit, visit: BackwardVisit) -> Record:
        sensitivity = visit.finish()
        vectors = self._write(unit, "vectors", sensitivity.vectors)
        return Record(artifacts={"vectors": vectors}, facts=sensitivity.figures)


def open_visit(shop: Workshop, shard: Shard) -> Visit:
    """Load a shard; the head, which only exits need, makes room for anything else."""
    if shard.units == ("entry",):
        return EntryVisit(shop, shard)
    if isinstance(shard.units[0], Exit):
        return ExitVisit(shop, shard)
    shop.unload_head()
    return ForwardShard(shop, shard) if shard.stage is Stage.FORWARD else BackwardShard(shop, shard)


def _index(unit: Unit) -> int:
    assert isinstance(unit, int)
    return unit
