"""Visits of an evaluation: the source and its variants run side by side, from tokens to figures of every token.

What goes from unit to unit has a leading dimension of rows, one a model; of size 1 where all models still agree.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from actors.block_visits import index_of
from actors.gates import EntryVisit, PixelsVisit
from actors.messages import Unit
from actors.visit import Visit
from prismaquant_ray.evaluation.divergence import SourceLogits, TokenFigures
from prismaquant_ray.evaluation.variants import LoadedBlock, Variants
from prismaquant_ray.models.draft import most_likely
from prismaquant_ray.models.runner import ModelRunner
from prismaquant_ray.sensitivity.fisher import IGNORED
from prismaquant_ray.storage.record import Record


class _SideBySide(Visit):
    """A visit for every row."""

    @property
    def variants(self) -> Variants:
        """The models."""
        assert self.shop.variants is not None
        return self.shop.variants

    def distinct(self) -> list[ModelRunner]:
        """The runner of each row, or the one that all rows have: then their inputs are the same."""
        runners = self.variants.runners
        return list(runners) if len(set(runners)) > 1 else [runners[0]]


class PixelsSideBySide(_SideBySide, PixelsVisit):
    """Pixels to patches of every model."""

    @override
    def start(self) -> None:
        self.resident.enter_context(self.variants.resident(ModelRunner.pixels))

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        inputs = self.shop.batches[microbatch].inputs
        with torch.no_grad():
            return torch.stack([runner.patches(inputs) for runner in self.distinct()])


class EntrySideBySide(_SideBySide, EntryVisit):
    """Token ids, and what each model made of images, to hidden states."""

    @override
    def start(self) -> None:
        self.resident.enter_context(self.variants.resident(ModelRunner.entry))

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        inputs, runners = self.shop.batches[microbatch].inputs, self.variants.runners
        with torch.no_grad():
            if self._has_image(microbatch):
                return torch.stack([runner.embed(inputs, arriving[row]) for row, runner in enumerate(runners)])
            return torch.stack([runner.embed(inputs) for runner in self.distinct()])


class BlocksSideBySide(_SideBySide):
    """Blocks of every model, one after the other."""

    @override
    def start(self) -> None:
        self.blocks = {unit: self.variants.load(index_of(unit)) for unit in self.shard.units}
        layout = self.shop.runner.layout
        self.moved["read"] += sum(layout.blocks[index_of(unit)].source_bytes for unit in self.blocks)

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        for block in self.blocks.values():
            arriving = block.run(arriving, self.shop.batches[microbatch])
        return arriving

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        return iter(())

    @override
    def close(self) -> None:
        super().close()
        self.blocks.clear()


class DraftSideBySide(_SideBySide):
    """A draft head: how often its best guess for the token after the next is what its own model then finds best."""

    is_read = False

    @override
    def start(self) -> None:
        index = index_of(self.shard.units[0])
        self.resident.enter_context(self.variants.resident(lambda runner: runner.beside(index)))
        self.block: LoadedBlock = self.variants.load(index)
        self.agreed = [0] * self.variants.rows
        self.tokens = 0

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        batch, at_once = self.shop.batches[microbatch], self.shop.loss.piece
        with torch.no_grad():
            for row, runner in enumerate(self.variants.runners):
                drafted = self.block.row(row, arriving[row], batch)
                with self.variants.head_of(row):
                    spoken = most_likely(runner.logits, arriving[row][:, 1:], at_once)
                    guessed = most_likely(runner.draft_logits, drafted, at_once)
                self.agreed[row] += int((guessed == spoken).sum())
            self.tokens += drafted.shape[0] * drafted.shape[1]
        return torch.empty(0)

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        yield self.shard.units[0], Record(artifacts={}, facts={"agreed": self.agreed, "tokens": self.tokens})


class ExitSideBySide(_SideBySide):
    """Final norm and head of every model: figures of every token, each variant against the source."""

    is_read = False

    @override
    def start(self) -> None:
        self.shop.load_head()
        self.figures: dict[str, Tensor] = {}

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        batch, runners = self.shop.batches[microbatch], self.variants.runners
        found: list[list[TokenFigures]] = [[] for _ in runners]
        sequences: list[Tensor] = []
        with torch.no_grad():
            for sequence, where, following in self._pieces(batch.tokens):
                counted = following != self.image_token
                sequences.append(torch.full((int(counted.sum()),), batch.first_sequence + sequence))
                source: SourceLogits | None = None
                for row, runner in enumerate(runners):
                    with self.variants.head_of(row):
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
        """What is never predicted; a number that is no token where there are no images."""
        token = self.shop.runner.layout.image_token
        return IGNORED - 1 if token is None else token

    def _pieces(self, tokens: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Sequence, positions, and the token that follows each of them, negative at a sequence's end."""
        device, step = self.shop.runner.device, self.shop.loss.piece
        for sequence, ids in enumerate(tokens):
            following = torch.cat([ids[1:], torch.full((1,), IGNORED)]).to(device)
            for start in range(0, len(ids), step):
                where = slice(start, min(start + step, len(ids)))
                yield sequence, where, following[where]

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        unit = self.shard.units[0]
        yield unit, Record(artifacts={"figures": self._write(unit, "figures", self.figures)})
