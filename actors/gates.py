"""Visits of units that are no blocks: what is before the vision tower, the embedding, the exit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from actors.messages import Activation, Stage, Unit
from actors.visit import Visit
from prismaquant_ray.errors import InputError
from prismaquant_ray.storage.record import Artifact, Record


class Gate(Visit):
    """A unit that is no block. It produces nothing but its boundary."""

    @override
    def products(self) -> Iterator[tuple[Unit, Record]]:
        return iter(())


class PixelsVisit(Gate):
    """What is before the vision tower's blocks: pixels to patches."""

    @override
    def start(self) -> None:
        self.resident.enter_context(self.shop.runner.pixels())

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        with torch.no_grad():
            return self.shop.runner.patches(self.shop.batches[microbatch].inputs)


class EntryVisit(Gate):
    """The embedding: token ids, and what the merger made of images, to hidden states."""

    @override
    def start(self) -> None:
        self.resident.enter_context(self.shop.runner.entry())

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        features = arriving if self._has_image(microbatch) else None
        with torch.no_grad():
            return self.shop.runner.embed(self.shop.batches[microbatch].inputs, features)

    @override
    def _arriving(self, microbatch: int, arriving: Activation | Artifact | None) -> Tensor:
        return super()._arriving(microbatch, arriving) if self._has_image(microbatch) else torch.empty(0)

    def _has_image(self, microbatch: int) -> bool:
        return microbatch >= self.shop.course.texts


class ExitVisit(Gate):
    """Final norm and head: hidden states to the gradient of the loss."""

    @override
    def start(self) -> None:
        self.shop.load_head()
        self.hidden = self.shop.inbox(self.shard, Stage.FORWARD, (self.shop.course.last,))

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        runner, batch = self.shop.runner, self.shop.batches[microbatch]
        hidden, size = self.hidden.get(microbatch)
        self.moved["read"] += size
        gradient, loss = self.shop.loss.gradient(runner.logits, hidden.to(runner.device), batch)
        if not math.isfinite(loss):
            first, last = batch.first_sequence, batch.first_sequence + len(batch.tokens) - 1
            raise InputError(
                f"the model's loss on calibration sequences {first} to {last} is {loss}; is the checkpoint intact?"
            )
        self.facts["loss"] = loss
        return gradient
