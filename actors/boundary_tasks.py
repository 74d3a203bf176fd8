"""Tasks at both ends of the model: patch embedding, token embedding, exit. They produce no record."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from actors.schedule.units import Stage
from actors.shard_task import UnitTask
from prismaquant_ray.errors import InputError


class PixelsTask(UnitTask):
    """The part before the vision tower's blocks: pixels to patches."""

    @override
    def load(self) -> None:
        self.attempt.resident.enter_context(self.context.runner.pixels())

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        with torch.no_grad():
            return self.context.runner.patches(self.context.batches[microbatch].inputs)


class EntryTask(UnitTask):
    """The embedding: token ids, and the merger's features of images, to hidden states."""

    @override
    def load(self) -> None:
        self.attempt.resident.enter_context(self.context.runner.entry())

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        features = arriving if self.context.graph.has_image(microbatch) else None
        with torch.no_grad():
            return self.context.runner.embed(self.context.batches[microbatch].inputs, features)


class ExitTask(UnitTask):
    """Final norm and head: hidden states to the gradient of the loss."""

    @override
    def load(self) -> None:
        self.context.load_head()
        self.hidden = self.attempt.inbox(Stage.FORWARD, self.context.graph.last)

    @override
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        runner, batch = self.context.runner, self.context.batches[microbatch]
        hidden = self.attempt.receive(self.hidden, microbatch)
        gradient, loss = self.context.loss.gradient(runner.logits, hidden, batch)
        if not math.isfinite(loss):
            first, last = batch.first_sequence, batch.first_sequence + len(batch.tokens) - 1
            raise InputError(
                f"the model's loss on calibration sequences {first} to {last} is {loss}; is the checkpoint intact?"
            )
        self.attempt.loss = loss
        return gradient
