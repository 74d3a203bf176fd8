"""Tasks of blocks in the forward and the backward pass: each runs the core's block pass and leaves a record."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from actors.schedule.units import Stage, Unit
from actors.shard_task import Attempt, Stored, UnitTask, made
from prismaquant_ray.backward.block import BlockBackward, HeadBackward
from prismaquant_ray.block_records import CacheScales
from prismaquant_ray.evaluation.variants import LoadedBlock
from prismaquant_ray.factors import Equalization
from prismaquant_ray.forward.block import BlockForward
from prismaquant_ray.forward.decoded_candidates import CandidateTensors
from prismaquant_ray.records import FACTORS
from prismaquant_ray.serialization import to_json
from prismaquant_ray.storage.record import Record

_Pass = TypeVar("_Pass", BlockForward, BlockBackward, HeadBackward, LoadedBlock)


class BlocksTask(UnitTask, Generic[_Pass]):
    """Blocks in one pass, by unit."""

    @abstractmethod
    def open(self, unit: Unit) -> _Pass:
        """Load a block."""

    @override
    def load(self) -> None:
        self.blocks: dict[Unit, _Pass] = {unit: self.open(unit) for unit in self.attempt.shard.units}
        self.attempt.read_bytes += sum(block.block.source_bytes for block in self.blocks.values())

    @override
    def close(self) -> None:
        self.blocks.clear()


class RecordedBlocksTask(BlocksTask[_Pass]):
    """Blocks each of which leaves a record, if it must produce something."""

    @abstractmethod
    def record(self, unit: Unit, block: _Pass) -> Stored:
        """Finish a block and begin to store its product; the record, when all of it is stored."""

    @override
    def products(self) -> Iterator[tuple[Unit, Stored]]:
        for unit in self.attempt.producing:
            yield unit, self.record(unit, self.blocks.pop(unit))


class ForwardTask(RecordedBlocksTask[BlockForward]):
    """Blocks of the forward pass: run, gather statistics, encode."""

    @override
    def open(self, unit: Unit) -> BlockForward:
        return BlockForward(
            self.context.runner,
            index_of(unit),
            self.attempt.formats(unit),
            self.context.rounding,
            equalize=self.context.config.rounding.equalize,
        )

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        for block in self.blocks.values():
            arriving = block.run(arriving, self.context.batches[microbatch])
        return arriving

    @override
    def record(self, unit: Unit, block: BlockForward) -> Stored:
        candidates = block.finish()
        writing = {
            str(name): self.context.threads.submit(self.attempt.write, unit, name, tensors)
            for name, tensors in candidates.tensors.items()
        }
        if candidates.factors:
            writing[FACTORS] = self.context.threads.submit(self.attempt.write, unit, FACTORS, candidates.factors)

        def stored() -> Record:
            artifacts = {name: artifact.result() for name, artifact in writing.items()}
            return Record(artifacts=artifacts, metrics=to_json(candidates.record))

        return stored


class BackwardTask(RecordedBlocksTask[BlockBackward]):
    """Blocks of the backward pass: recomputed from the boundary below them, differentiated from the top, priced."""

    @override
    def load(self) -> None:
        super().load()
        self.hidden = self.attempt.inbox(Stage.FORWARD, self.context.graph.below(self.attempt.shard.units[-1]))

    @override
    def open(self, unit: Unit) -> BlockBackward:
        formats, candidates = self.attempt.formats(unit), candidates_of(self.attempt, unit)
        equalization, cache = folded_and_cached(self.attempt, unit)
        return BlockBackward(self.context.runner, index_of(unit), formats, candidates, equalization, cache)

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        hidden, batch = self.attempt.receive(self.hidden, microbatch), self.context.batches[microbatch]
        for block in reversed(self.blocks.values()):
            hidden = block.forward(hidden, batch)
        for block in self.blocks.values():
            arriving = block.backward(arriving, batch)
        return arriving

    @override
    def record(self, unit: Unit, block: BlockBackward) -> Stored:
        return made(Record(metrics=to_json(block.finish(self.context.split))))


class HeadBackwardTask(RecordedBlocksTask[HeadBackward]):
    """A draft head or an output head in the backward pass: its own loss on the output of the last decoder block."""

    @override
    def load(self) -> None:
        super().load()
        self.hidden = self.attempt.inbox(Stage.FORWARD, self.context.graph.last)

    @override
    def open(self, unit: Unit) -> HeadBackward:
        formats, candidates = self.attempt.formats(unit), candidates_of(self.attempt, unit)
        equalization, cache = folded_and_cached(self.attempt, unit)
        runner, loss = self.context.runner, self.context.loss
        return HeadBackward(runner, index_of(unit), formats, candidates, loss, equalization, cache)

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        for head in self.blocks.values():
            head.run(self.attempt.receive(self.hidden, microbatch), self.context.batches[microbatch])
        return arriving

    @override
    def record(self, unit: Unit, block: HeadBackward) -> Stored:
        return made(Record(metrics=to_json(block.finish(self.context.split))))


class HeadTask(UnitTask):
    """A head in either pass: `task` with the other modules that it needs loaded; nothing reads its output."""

    is_read = False

    def __init__(self, attempt: Attempt, task: UnitTask) -> None:
        super().__init__(attempt)
        self.task = task

    @override
    def load(self) -> None:
        beside = self.context.runner.beside(index_of(self.attempt.shard.units[0]))
        self.attempt.resident.enter_context(beside)
        self.task.load()

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        self.task.step(microbatch, arriving)
        return torch.empty(0)

    @override
    def products(self) -> Iterator[tuple[Unit, Stored]]:
        return self.task.products()

    @override
    def close(self) -> None:
        self.task.close()


def candidates_of(attempt: Attempt, unit: Unit) -> CandidateTensors:
    """The candidates of a block that is priced; empty for one that is only run."""
    if not attempt.formats(unit):
        return {}
    tensors, size = attempt.context.candidates.get(index_of(unit))
    attempt.read_bytes += size
    return tensors


def folded_and_cached(attempt: Attempt, unit: Unit) -> tuple[Equalization, dict[str, CacheScales]]:
    """The folds of a block, and the scales of its cache where it is priced."""
    stored, index = attempt.context.stored, index_of(unit)
    return stored.equalization(index), stored.cache(index) if attempt.formats(unit) else {}


def index_of(unit: Unit) -> int:
    """The block index of a unit."""
    assert isinstance(unit, int)
    return unit
