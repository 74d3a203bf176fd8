"""Tasks of blocks in the forward and the backward pass: each block has the core's block pass, and leaves a record."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from actors.schedule.units import Stage, Unit
from actors.shard_task import Attempt, UnitTask
from prismaquant_ray.backward.block import BlockBackward, HeadBackward
from prismaquant_ray.forward.block import BlockForward
from prismaquant_ray.forward.decoded_candidates import CandidateTensors
from prismaquant_ray.records import to_json
from prismaquant_ray.storage.record import Record


class ForwardTask(UnitTask):
    """Blocks of the forward pass: run, gather statistics, encode."""

    @override
    def load(self) -> None:
        runner, rounding = self.context.runner, self.context.rounding
        self.blocks: dict[Unit, BlockForward] = {
            unit: BlockForward(runner, index_of(unit), self.attempt.formats(unit), rounding)
            for unit in self.attempt.shard.units
        }
        self.attempt.read_bytes += sum(block.block.source_bytes for block in self.blocks.values())

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        for block in self.blocks.values():
            arriving = block.run(arriving, self.context.batches[microbatch])
        return arriving

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        for unit in self.attempt.producing:
            yield unit, self._record(unit, self.blocks.pop(unit))

    def _record(self, unit: Unit, block: BlockForward) -> Record:
        candidates = block.finish()
        artifacts = {str(name): self.attempt.write(unit, name, each) for name, each in candidates.tensors.items()}
        return Record(artifacts=artifacts, metrics=to_json(candidates.record))

    @override
    def close(self) -> None:
        self.blocks.clear()


class BackwardTask(UnitTask):
    """Blocks of the backward pass: recomputed from the boundary below them, differentiated from the top, priced."""

    @override
    def load(self) -> None:
        runner = self.context.runner
        self.blocks: dict[Unit, BlockBackward] = {
            unit: BlockBackward(runner, index_of(unit), self.attempt.formats(unit), candidates_of(self.attempt, unit))
            for unit in self.attempt.shard.units
        }
        self.attempt.read_bytes += sum(block.block.source_bytes for block in self.blocks.values())
        self.hidden = self.attempt.inbox(Stage.FORWARD, self.context.graph.below(self.attempt.shard.units[-1]))

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        hidden, batch = self.attempt.receive(self.hidden, microbatch), self.context.batches[microbatch]
        for block in reversed(self.blocks.values()):
            hidden = block.forward(hidden, batch)
        for block in self.blocks.values():
            arriving = block.backward(arriving, batch)
        return arriving

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        for unit in self.attempt.producing:
            yield unit, record_of(self.attempt, self.blocks.pop(unit))

    @override
    def close(self) -> None:
        self.blocks.clear()


class HeadBackwardTask(UnitTask):
    """A draft head or an output head in the backward pass: its own loss on the output of the last decoder block."""

    @override
    def load(self) -> None:
        runner, attempt, loss = self.context.runner, self.attempt, self.context.loss
        self.heads: dict[Unit, HeadBackward] = {
            unit: HeadBackward(runner, index_of(unit), attempt.formats(unit), candidates_of(attempt, unit), loss)
            for unit in attempt.shard.units
        }
        attempt.read_bytes += sum(head.block.source_bytes for head in self.heads.values())
        self.hidden = attempt.inbox(Stage.FORWARD, self.context.graph.last)

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        for head in self.heads.values():
            head.run(self.attempt.receive(self.hidden, microbatch), self.context.batches[microbatch])
        return arriving

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        for unit in self.attempt.producing:
            yield unit, record_of(self.attempt, self.heads.pop(unit))

    @override
    def close(self) -> None:
        self.heads.clear()


class HeadTask(UnitTask):
    """A head in either pass: `task` beside the part of the model that it needs; nothing reads what it puts out."""

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
    def products(self) -> Iterator[tuple[Unit, Record]]:
        return self.task.products()

    @override
    def close(self) -> None:
        self.task.close()


def candidates_of(attempt: Attempt, unit: Unit) -> CandidateTensors:
    """The candidates that a block is priced with; none for one that is only run."""
    if not attempt.formats(unit):
        return {}
    tensors, size = attempt.context.candidates.get(index_of(unit))
    attempt.read_bytes += size
    return tensors


def record_of(attempt: Attempt, block: BlockBackward | HeadBackward) -> Record:
    """The prices of a block, stored."""
    return Record(metrics=to_json(block.finish(attempt.context.calibration.positions)))


def index_of(unit: Unit) -> int:
    """The block that a unit is."""
    assert isinstance(unit, int)
    return unit
