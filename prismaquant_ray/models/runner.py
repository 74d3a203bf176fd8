"""Loading a block's weights from the checkpoint into the skeleton, and letting go of them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prismaquant_ray.checkpoint.reader import Checkpoint
from prismaquant_ray.errors import InputError
from prismaquant_ray.models.inspect import build


class ModelRunner:
    """Runs a checkpoint block by block in `dtype` on `device`; holds only what the caller has loaded.

    Weights never require gradients: the probe differentiates with respect to activations.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.skeleton, self.layout = build(checkpoint)
        for module in self.skeleton.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(device))

    def load_block(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights; InputError names a tensor that is NaN or infinite."""
        block = self.layout.blocks[index]
        weights = self._read(block.tensors)
        module = self.skeleton.new_block(index)
        cut = len(block.prefix) + 1
        module.load_state_dict({name[cut:]: tensor for name, tensor in weights.items()}, strict=True, assign=True)
        return module.requires_grad_(False).to(self.device)

    @contextmanager
    def entry(self) -> Iterator[None]:
        """The embedding is loaded inside the with-block."""
        with self._resident(self.layout.embedding):
            yield

    @contextmanager
    def exit(self) -> Iterator[None]:
        """Final norm and head are loaded inside the with-block."""
        with self._resident(self.layout.head):
            yield

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters block 0 for token ids (sequences, tokens); call inside `entry()`."""
        return self.skeleton.embed(tokens.to(self.device))

    def run_block(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """What leaves a block; differentiable in `hidden`."""
        return self.skeleton.run_block(index, block, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (sequences, tokens, vocabulary); call inside `exit()`."""
        return self.skeleton.logits(hidden)

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        weights = self.checkpoint.read(names)
        check_finite(weights, self.checkpoint.store.uri)
        return {name: tensor.to(self.dtype) for name, tensor in weights.items()}

    @contextmanager
    def _resident(self, names: Sequence[str]) -> Iterator[None]:
        model = self.skeleton.model
        weights = {name: nn.Parameter(t.to(self.device), requires_grad=False) for name, t in self._read(names).items()}
        # A tied head is the same parameter under two owners; both must see the loaded one.
        by_identity = {id(model.get_parameter(name)): value for name, value in weights.items()}
        replaced: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        for module in model.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in by_identity:
                    replaced.append((module, leaf, parameter))
                    setattr(module, leaf, by_identity[id(parameter)])
        try:
            yield
        finally:
            for module, leaf, parameter in replaced:
                setattr(module, leaf, parameter)


def check_finite(weights: dict[str, Tensor], where: str) -> None:
    """InputError naming the first tensor with a NaN or an infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"{where}: {name} holds {count} NaN or infinite values; the checkpoint is damaged")
