"""Visits of blocks, in both passes: each block has the core's own visit, and leaves a record."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from actors.messages import Stage, Unit
from actors.visit import Visit
from prismaquant_ray.checkpoint.decoded_candidates import CandidateTensors
from prismaquant_ray.formats import FormatName
from prismaquant_ray.rounding.forward_pass import ForwardVisit
from prismaquant_ray.sensitivity.backward_pass import BackwardVisit, LeafVisit
from prismaquant_ray.sensitivity.pricing import BlockSensitivity
from prismaquant_ray.storage.record import Record

_Core = TypeVar("_Core", ForwardVisit, BackwardVisit)


class BlocksVisit(Visit, Generic[_Core]):
    """Decoder blocks, each with the core's own visit; those that produce leave a record."""

    @override
    def start(self) -> None:
        self.blocks: dict[Unit, _Core] = {unit: self.load(index_of(unit)) for unit in self.shard.units}
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
        for visit in self.blocks.values():
            arriving = visit.run(arriving, self.shop.batches[microbatch])
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
        self.hidden = self.shop.inbox(self.shard, Stage.FORWARD, (self.shop.course.below(self.shard.units[-1]),))

    @override
    def load(self, index: int) -> BackwardVisit:
        formats = self.formats(index)
        return BackwardVisit(self.shop.runner, index, formats, self._candidates(index) if formats else {})

    def _candidates(self, index: int) -> CandidateTensors:
        tensors, size = self.shop.candidates.take(index)
        self.moved["read"] += size
        return tensors

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        hidden, batch = self._below(microbatch), self.shop.batches[microbatch]
        for visit in reversed(self.blocks.values()):
            hidden = visit.forward(hidden, batch)
        for visit in self.blocks.values():
            arriving = visit.backward(arriving, batch)
        return arriving

    def _below(self, microbatch: int) -> Tensor:
        hidden, size = self.hidden.get(microbatch)
        self.moved["read"] += size
        return hidden.to(self.shop.runner.device)

    @override
    def record(self, unit: Unit, visit: BackwardVisit) -> Record:
        sensitivity: BlockSensitivity = visit.finish(self.shop.calibration.positions)
        vectors = self._write(unit, "vectors", sensitivity.vectors)
        return Record(artifacts={"vectors": vectors}, facts=sensitivity.figures)


class Leaf(BlocksVisit[_Core]):
    """A draft head or an output head: it needs more of the model than itself, and nothing reads what it puts out."""

    is_read = False

    @override
    def start(self) -> None:
        self.resident.enter_context(self.shop.runner.beside(index_of(self.shard.units[0])))
        super().start()


class ForwardLeaf(Leaf[ForwardVisit], ForwardShard):
    """A leaf in the forward pass."""

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        super().step(microbatch, arriving)
        return torch.empty(0)


class BackwardLeaf(Leaf[BackwardVisit], BackwardShard):
    """A leaf in the backward pass: its own loss on what the last decoder block put out."""

    @override
    def load(self, index: int) -> LeafVisit:
        formats = self.formats(index)
        return LeafVisit(self.shop.runner, index, formats, self._candidates(index) if formats else {}, self.shop.loss)

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        for visit in self.blocks.values():
            assert isinstance(visit, LeafVisit)
            visit.run(self._below(microbatch), self.shop.batches[microbatch])
        return torch.empty(0)


def index_of(unit: Unit) -> int:
    """The block that a unit is."""
    assert isinstance(unit, int)
    return unit
