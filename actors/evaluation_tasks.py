"""Tasks of an evaluation: the source and its variants run side by side, from tokens to figures of every token.

Boundaries between units have a leading dimension of rows, one per model; size 1 where all models share the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from actors.block_tasks import RecordedBlocksTask, index_of
from actors.schedule.units import Unit
from actors.shard_task import Stored, UnitTask, made
from prismaquant_ray.backward.loss import IGNORED
from prismaquant_ray.block_records import DraftRecord
from prismaquant_ray.evaluation.divergence import SourceLogits, TokenFigures
from prismaquant_ray.evaluation.variants import LoadedBlock
from prismaquant_ray.model.mtp_head import most_likely
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.serialization import to_json
from prismaquant_ray.storage.record import Record


class PixelsEvaluation(UnitTask):
    """Pixels to patches of every model."""

    @override
    def load(self) -> None:
        self.attempt.resident.enter_context(self.context.models.resident(ModelRunner.pixels))

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        inputs = self.context.batches[microbatch].inputs
        with torch.no_grad():
            return torch.stack([runner.patches(inputs) for runner in _distinct(self.context.models.runners)])


class EntryEvaluation(UnitTask):
    """Token ids, and each model's features of images, to hidden states."""

    @override
    def load(self) -> None:
        self.attempt.resident.enter_context(self.context.models.resident(ModelRunner.entry))

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        inputs, runners = self.context.batches[microbatch].inputs, self.context.models.runners
        with torch.no_grad():
            if self.context.graph.has_image(microbatch):
                return torch.stack([runner.embed(inputs, arriving[row]) for row, runner in enumerate(runners)])
            return torch.stack([runner.embed(inputs) for runner in _distinct(self.context.models.runners)])


class BlocksEvaluation(RecordedBlocksTask[LoadedBlock]):
    """Blocks of every model, one after the other. Those of a mixture of experts leave what their routers chose."""

    @override
    def open(self, unit: Unit) -> LoadedBlock:
        return self.context.models.load(index_of(unit))

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        for block in self.blocks.values():
            arriving = block.run(arriving, self.context.batches[microbatch])
        return arriving

    @override
    def record(self, unit: Unit, block: LoadedBlock) -> Stored:
        return made(Record(metrics=to_json(block.routing.record())))


class DraftEvaluation(UnitTask):
    """A draft head: how often its best guess for the token after the next is its own model's best one, too."""

    is_read = False

    @override
    def load(self) -> None:
        index = index_of(self.attempt.shard.units[0])
        self.attempt.resident.enter_context(self.context.models.resident(lambda runner: runner.beside(index)))
        self.block: LoadedBlock = self.context.models.load(index)
        self.agreed = [0] * self.context.models.rows
        self.tokens = 0

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        batch, at_once = self.context.batches[microbatch], self.context.loss.piece
        with torch.no_grad():
            for row, runner in enumerate(self.context.models.runners):
                drafted = self.block.row(row, arriving[row], batch)
                with self.context.models.head_of(row):
                    spoken = most_likely(runner.logits, arriving[row][:, 1:], at_once)
                    guessed = most_likely(runner.draft_logits, drafted, at_once)
                self.agreed[row] += int((guessed == spoken).sum())
            self.tokens += drafted.shape[0] * drafted.shape[1]
        return torch.empty(0)

    @override
    def products(self) -> Iterator[tuple[Unit, Stored]]:
        record = DraftRecord(agreed=self.agreed, tokens=self.tokens)
        yield self.attempt.shard.units[0], made(Record(metrics=to_json(record)))


class ExitEvaluation(UnitTask):
    """Final norm and head of every model: figures of every token, each variant against the source."""

    is_read = False

    @override
    def load(self) -> None:
        self.context.load_head()
        self.figures: dict[str, Tensor] = {}

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        batch, runners = self.context.batches[microbatch], self.context.models.runners
        found: list[list[TokenFigures]] = [[] for _ in runners]
        sequences: list[Tensor] = []
        with torch.no_grad():
            for sequence, where, following in self._pieces(batch.tokens):
                counted = following != self.image_token
                sequences.append(torch.full((int(counted.sum()),), batch.first_sequence + sequence))
                source: SourceLogits | None = None
                for row, runner in enumerate(runners):
                    with self.context.models.head_of(row):
                        logits = runner.logits(arriving[row, sequence : sequence + 1, where])[0][counted]
                    if source is None:
                        source = SourceLogits(logits, following[counted])
                    found[row].append(source.against(logits))
        self.figures = {"sequence": torch.cat(sequences)}
        for name, column in (("kl", 0), ("agrees", 1), ("loss", 2)):
            self.figures[name] = torch.stack([torch.cat([piece[column] for piece in row]) for row in found]).cpu()
        return torch.empty(0)

    @property
    def image_token(self) -> int:
        """The token that is never predicted; without images an id that no token has."""
        token = self.context.runner.layout.image_token
        return IGNORED - 1 if token is None else token

    def _pieces(self, tokens: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Sequence, positions, and the token that follows each of them, negative at a sequence's end."""
        device, step = self.context.runner.device, self.context.loss.piece
        for sequence, ids in enumerate(tokens):
            following = torch.cat([ids[1:], torch.full((1,), IGNORED)]).to(device)
            for start in range(0, len(ids), step):
                where = slice(start, min(start + step, len(ids)))
                yield sequence, where, following[where]

    @override
    def products(self) -> Iterator[tuple[Unit, Stored]]:
        unit = self.attempt.shard.units[0]
        yield unit, made(Record(artifacts={"figures": self.attempt.write(unit, "figures", self.figures)}))


def _distinct(runners: Sequence[ModelRunner]) -> list[ModelRunner]:
    """The runner of each row; a single one when all rows share it, because their inputs are the same then."""
    return list(runners) if len(set(runners)) > 1 else [runners[0]]
