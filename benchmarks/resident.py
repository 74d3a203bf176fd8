"""A model with every block in memory, so that fused groups can be replaced and text run through it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoded import Decoded
from prismaquant_ray import FORMATS
from prismaquant_ray.calibration.dataset import TOKENS
from prismaquant_ray.evaluation.divergence import SourceLogits
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.storage.store import Store


class ResidentModel:
    """A checkpoint in float32, and tokens (sequences, length) to run through it, `at_once` sequences at a time."""

    def __init__(self, source: Path, tokens: Tensor, *, at_once: int) -> None:
        self.runner = ModelRunner(Checkpoint(Store(source)), dtype=torch.float32, device=torch.device("cpu"))
        self.layout = self.runner.layout
        self.blocks = [self.runner.load_block(block.index) for block in self.layout.blocks]
        self.tokens = tokens
        self.inputs = [{TOKENS: part} for part in tokens.split(at_once)]
        with self.runner.entry(), torch.no_grad():
            self.entering = [self.runner.embed(inputs) for inputs in self.inputs]

    def block_of(self, group: str) -> nn.Module:
        """The module of the block that a fused group is in."""
        return self.blocks[self.layout.block_of[group].index]

    @torch.no_grad()
    def run(self, entering: Sequence[Tensor] | None = None, blocks: range | None = None) -> Iterator[Tensor]:
        """What leaves `blocks` for what enters the first of them, a microbatch at a time; by default the whole model's.

        Hidden states are (sequences, tokens, H).
        """
        for hidden, inputs in zip(self.entering if entering is None else entering, self.inputs, strict=True):
            leaving = hidden
            for index in range(len(self.blocks)) if blocks is None else blocks:
                leaving = self.runner.run_block(index, self.blocks[index], leaving, inputs)
            yield leaving

    @torch.no_grad()
    def logits(self, leaving: Iterable[Tensor]) -> Iterator[Tensor]:
        """Logits (tokens, vocabulary) of every sequence, from what leaves the last block."""
        with self.runner.exit():
            for hidden in leaving:
                for row in hidden:
                    yield self._logits(row)

    @torch.no_grad()
    def compared(self, source: Iterable[Tensor], leaving: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """KL in nats, and whether both find the same token most likely, of every token: (sequences, tokens) each.

        Both models are given by what leaves their last blocks.
        """
        kls, agrees = [], []
        with self.runner.exit():
            for clean, quantized in zip(source, leaving, strict=True):
                for p, q in zip(clean, quantized, strict=True):
                    figures = SourceLogits(self._logits(p), torch.full((len(p),), -1)).against(self._logits(q))
                    kls.append(figures.kl)
                    agrees.append(figures.agrees)
        return torch.stack(kls), torch.stack(agrees)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Of one sequence (tokens, H), while the head is loaded."""
        logits: Tensor = self.runner.logits(hidden.unsqueeze(0))[0]
        return logits

    @contextmanager
    def quantized(self, groups: Mapping[str, Decoded], shipped: TensorSource, *, activations: bool) -> Iterator[None]:
        """The groups have these weights inside the with-block, and their inputs are rounded as their runtime does.

        What is not quantized is as `shipped` has it: norms take factors that the groups' inputs were equalized by.
        """
        with ExitStack() as stack:
            runner = ModelRunner(shipped, dtype=torch.float32, device=torch.device("cpu"))
            for index in {self.layout.block_of[name].index for name in groups}:
                parameters = dict(self.blocks[index].named_parameters())
                for path, parameter in runner.load_block(index).named_parameters():
                    stack.callback(setattr, parameters[path], "data", parameters[path].data)
                    parameters[path].data = parameter.data
            for name, group in groups.items():
                module = self.block_of(name)
                rounding = FORMATS[group.format].round_activation if activations else None
                for path, weight in group.weights.items():
                    parameter = module.get_parameter(path)
                    stack.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = weight
                    if rounding is not None:
                        rounded = functools.partial(_rounded, rounding, group.scales[path])
                        _round_inputs(module, path, rounded, stack)
            yield


def _rounded(rounding: Any, scale: Tensor | None, x: Tensor) -> Tensor:
    rows: Tensor = rounding(x.flatten(0, -2), scale)
    return rows.view_as(x)


def _round_inputs(module: nn.Module, path: str, rounded: Any, stack: ExitStack) -> None:
    """What the Linear, or the packed experts, of a parameter read is rounded until the stack is left."""
    owner, _, leaf = path.rpartition(".")
    holder: Any = module.get_submodule(owner)
    if leaf == "weight":
        handle = holder.register_forward_pre_hook(lambda _, arguments: (rounded(arguments[0]), *arguments[1:]))
        stack.callback(handle.remove)
        return
    before = getattr(holder, "roundings", {})
    holder.roundings = {**before, leaf: rounded}
    stack.callback(setattr, holder, "roundings", before)
