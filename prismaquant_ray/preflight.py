"""A few tokens, and an image, through one block of each structure, with real weights, before anything is measured.

What would end a run after hours ends it here in seconds: a Linear that its block does not call, a buffer that nobody
filled, logits of another shape, NaN. Blocks are loaded one at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prismaquant_ray.backward.block import BlockBackward, Recomputed
from prismaquant_ray.backward.loss import Loss
from prismaquant_ray.calibration.dataset import TOKENS, Batch, CalibrationSet
from prismaquant_ray.errors import InputError
from prismaquant_ray.finite import all_finite
from prismaquant_ray.layout import Block, BlockKind
from prismaquant_ray.model.rehearsal import MODEL_ERRORS
from prismaquant_ray.model.runner import ModelRunner

_SEQUENCES, _LENGTH = 2, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """Blocks that were tried, by name, each standing for all of its structure; Linears that no gradient reached.

    `equalized` are inputs of their matrices that take factors per channel, `unequal` those that do not.
    """

    tried: tuple[str, ...]
    without_gradient: tuple[str, ...]
    equalized: tuple[str, ...]
    unequal: tuple[str, ...]
    seconds: float


def preflight(runner: ModelRunner, calibration: CalibrationSet, loss: Loss) -> Preflight:
    """Run the first tokens of a calibration set.

    Raises:
        InputError: naming the module that a run would fail at, and why.
    """
    begun = time.perf_counter()
    _check_buffers(runner)
    trial = _Trial(runner)
    text = Batch(
        inputs={TOKENS: calibration.tokens[:_SEQUENCES, :_LENGTH]},
        holdout=calibration.holdout[:_SEQUENCES],
        first_sequence=0,
    )
    chosen = {block.index: block for block in _representatives(runner)}
    decoder = [block for block in chosen.values() if block.kind is BlockKind.DECODER]
    for inputs in calibration.images[:1]:
        image = Batch(inputs=inputs, holdout=calibration.holdout[-1:], first_sequence=calibration.texts)
        with torch.no_grad(), runner.pixels():
            features = runner.patches(image.inputs)
        for block in chosen.values():
            if block.kind in (BlockKind.VISION, BlockKind.MERGER):
                features = trial.run(block, features, image)
        with torch.no_grad(), runner.entry():
            seen = runner.embed(image.inputs, features)
        trial.run(decoder[0], seen, image)
    with torch.no_grad(), runner.entry():
        hidden = runner.embed(text.inputs)
    for block in decoder:
        hidden = trial.run(block, hidden, text)
    _leave(runner, hidden, text, loss)
    for block in chosen.values():
        if block.kind in (BlockKind.DRAFT, BlockKind.HEAD):
            with runner.beside(block.index):
                trial.run(block, hidden, text)
    return Preflight(
        tried=tuple(dict.fromkeys(trial.tried)),
        without_gradient=tuple(dict.fromkeys(trial.without_gradient)),
        equalized=tuple(dict.fromkeys(trial.equalized)),
        unequal=tuple(dict.fromkeys(trial.unequal)),
        seconds=time.perf_counter() - begun,
    )


class _Trial:
    """Runs blocks, forward and backward."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.tried: list[str] = []
        self.without_gradient: list[str] = []
        self.equalized: list[str] = []
        self.unequal: list[str] = []
        # Not the output itself, nor ones: behind a norm both have no gradient.
        self._generator = torch.Generator().manual_seed(0)

    def run(self, block: Block, hidden: Tensor, batch: Batch) -> Tensor:
        """The output of a block for hidden (sequences, tokens, H); InputError for what a pass could not go on with."""
        name = block.prefix or block.groups[0].name
        try:
            block_pass = BlockBackward(self.runner, block.index, (), {})
            graph = block_pass.recompute(hidden, batch)
        except torch.OutOfMemoryError:
            raise  # says nothing of the model
        except MODEL_ERRORS as error:
            raise InputError(
                f"{name} cannot be run by itself: a few tokens end with {type(error).__name__} "
                f"({' '.join(str(error).split())[:200]}); this architecture is not supported"
            ) from error
        self._check_called(block, graph)
        if block.kind in (BlockKind.DECODER, BlockKind.VISION) and graph.output.shape != hidden.shape:
            raise InputError(
                f"{name} makes {tuple(graph.output.shape)} of {tuple(hidden.shape)}; a block that changes the shape of "
                "its hidden state is not supported"
            )
        if not all_finite(graph.output):
            raise InputError(f"{name} puts out NaN or infinite activations for a few tokens; is the checkpoint intact?")
        direction = torch.randn(graph.output.shape, generator=self._generator).to(graph.output)
        outputs = graph.captured.outputs
        gradients = torch.autograd.grad(graph.output, [graph.hidden, *outputs.values()], direction, allow_unused=True)
        reached = [gradient for gradient in gradients if gradient is not None]
        if len(reached) <= (gradients[0] is not None):
            raise InputError(f"{name}: no gradient reaches any of its Linears, so none can be priced")
        if not all_finite(*reached):
            raise InputError(f"{name} has NaN or infinite gradients for a few tokens; is the checkpoint intact?")
        self.tried.append(name)
        self._equalized(block, block_pass.module, hidden, batch)
        self.without_gradient += [
            f"{name}.{parameter}"
            for parameter, gradient in zip(outputs, gradients[1:], strict=True)
            if gradient is None
        ]
        return graph.output.detach()

    def _equalized(self, block: Block, module: nn.Module, hidden: Tensor, batch: Batch) -> None:
        folds = () if block.kind is BlockKind.HEAD else self.runner.folds(block.index, module, hidden, batch.inputs)
        multiplied = {member.parameter for fold in folds for member in fold.multiplied}
        for group in block.inputs:
            found = self.equalized if group.matrices[0].parameters[0] in multiplied else self.unequal
            found.append(group.name)

    def _check_called(self, block: Block, graph: Recomputed) -> None:
        for group in block.groups:
            for matrix in group.matrices:
                for parameter in matrix.parameters:
                    if parameter not in graph.captured.outputs:
                        raise InputError(
                            f"{matrix.name}: its block does not call it, so it cannot be measured; this architecture "
                            "needs a family that keeps it (docs/adding-a-model.md)"
                        )


def _leave(runner: ModelRunner, hidden: Tensor, batch: Batch, loss: Loss) -> None:
    """Final norm, head and loss, for the last block's output."""
    with runner.exit():
        with torch.no_grad():
            logits = runner.logits(hidden)
        if logits.ndim != hidden.ndim or logits.shape[:-1] != hidden.shape[:-1]:
            raise InputError(
                f"the output head makes logits {tuple(logits.shape)} of {tuple(hidden.shape)}, not one row a token; "
                "this architecture is not supported"
            )
        gradient, value = loss.gradient(runner.logits, hidden, batch)
        if not (math.isfinite(value) and all_finite(logits, gradient)):
            raise InputError("logits or loss of a few tokens are NaN or infinite; is the checkpoint intact?")


def _representatives(runner: ModelRunner) -> Iterator[Block]:
    """The first block of each structure, in order."""
    types = getattr(runner.meta_model.config.get_text_config(), "layer_types", None) or ()
    seen: set[Any] = set()
    decoders = 0
    for block in runner.layout.blocks:
        kind: Any = block.kind
        if block.kind is BlockKind.DECODER:
            # Layers that attend to a window have the shapes of those that attend to everything.
            kind = types[decoders] if decoders < len(types) else kind
            decoders += 1
        structure = kind, block.structure
        if structure not in seen:
            seen.add(structure)
            yield block


def _check_buffers(runner: ModelRunner) -> None:
    """InputError for a buffer that no checkpoint has and that transformers has not filled."""
    model = runner.meta_model
    parts: Mapping[str, Any] = {"": model.model} | {
        f"{model.blocks_path}.{index}.": layer for index, layer in enumerate(model.layers)
    }
    for prefix, part in parts.items():
        for name, buffer in part.named_buffers():
            if not buffer.is_meta and buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
                raise InputError(
                    f"{prefix}{name} is a buffer that transformers fills itself, but did not; this architecture is not "
                    "supported by the installed version of transformers"
                )
