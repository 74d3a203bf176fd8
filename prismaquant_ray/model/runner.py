"""Running a checkpoint block by block: a block's weights are loaded, used and released."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from prismaquant_ray.copies import DeviceCopies
from prismaquant_ray.errors import InputError
from prismaquant_ray.finite import FiniteChecks, all_finite
from prismaquant_ray.fold import Fold
from prismaquant_ray.layout import Block, BlockKind
from prismaquant_ray.model.folds import folds_of
from prismaquant_ray.model.layout_builder import Scope, build_layout
from prismaquant_ray.model.meta_model import PIXELS, Inputs
from prismaquant_ray.model.mtp_head import DraftHead
from prismaquant_ray.model.prefetch import Prefetcher
from prismaquant_ray.source.header import DTYPES
from prismaquant_ray.source.protocol import TensorSource

# Sequences and tokens that folds are proven on.
_PROVING = (2, 8)


class ModelRunner:
    """Runs a checkpoint block by block in `dtype` on `device`; holds only the weights that the caller has loaded.

    Weights never require gradients: the probe differentiates with respect to activations.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        scope: Scope = Scope(),  # noqa: B008 - frozen
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.meta_model, self.layout = build_layout(checkpoint, scope, dtype)
        #: Weights of blocks by parameter, by index, as `load_block` takes them.
        self.prefetcher: Prefetcher[int, dict[str, Tensor]] = Prefetcher(self._read_block)
        #: Of weights, to the device.
        self.copies = DeviceCopies(device)
        #: Of what blocks put out; whoever runs them settles these.
        self.checks = FiniteChecks(device)
        # What blocks read of a microbatch, on the device: `inputs` by their identity.
        self._inputs: dict[int, tuple[Inputs, Inputs]] = {}
        self._first_decoder = next(block.index for block in self.layout.blocks if block.kind is BlockKind.DECODER)
        for module in self.meta_model.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(device))

    # Loading --------------------------------------------------------------------------------------------------

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its weights; InputError names a tensor that is NaN or infinite."""
        block = self.layout.blocks[index]
        module = self._new(block)
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        weights = self.prefetcher.get(index)
        # The host lets go of each when it is on the device.
        state = {name: self.copies.take(weights.pop(name)).view(shapes[name]) for name in [*weights]}
        module.load_state_dict(state, strict=True, assign=True)
        return module.requires_grad_(False).to(self.device)

    def stored_types(self, index: int) -> dict[str, torch.dtype]:
        """The type in which the checkpoint has each parameter of a block."""
        found = {}
        for parameter in self.layout.blocks[index].parameters:
            if parameter.tensors:
                found[parameter.name] = DTYPES[self.checkpoint.tensors[parameter.tensors[0]].dtype]
        return found

    def _read_block(self, index: int) -> dict[str, Tensor]:
        """Weights by parameter; experts stored one by one are concatenated along the rows."""
        block = self.layout.blocks[index]
        read, weights = self._read(block.tensors), {}
        for parameter in block.parameters:
            tensors = [read.pop(name) for name in parameter.tensors]
            found = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            weights[parameter.name] = found.transpose(-1, -2).contiguous() if parameter.transposed else found
        return weights

    def _new(self, block: Block) -> nn.Module:
        """The block's module on the meta device."""
        if block.kind is BlockKind.DECODER:
            return self.meta_model.new_layer(block.index - self._first_decoder)
        if block.kind is BlockKind.VISION:
            return copy.deepcopy(self.meta_model.vision_layers[block.index])
        if block.kind is BlockKind.MERGER:
            return cast(nn.Module, copy.deepcopy(self.meta_model.merger))
        if block.kind is BlockKind.DRAFT:
            return DraftHead(self.meta_model)
        return nn.ModuleDict({self.head_name: copy.deepcopy(self.meta_model.model.get_output_embeddings())})

    @property
    def head_name(self) -> str:
        """The output head's path in the model."""
        output = self.meta_model.model.get_output_embeddings()
        return str(next(path for path, module in self.meta_model.model.named_modules() if module is output))

    def entry(self) -> AbstractContextManager[None]:
        """The embedding is loaded inside the with-block."""
        return self._resident(self.layout.embedding)

    def pixels(self) -> AbstractContextManager[None]:
        """The vision tower's modules before its blocks are loaded inside the with-block."""
        return self._resident(self.layout.pixels)

    def exit(self) -> AbstractContextManager[None]:
        """Final norm and head are loaded inside the with-block."""
        return self._resident(self.layout.head)

    def beside(self, index: int) -> AbstractContextManager[None]:
        """The other modules that a head's forward uses are loaded inside the with-block."""
        block = self.layout.blocks[index]
        wanted: dict[str, None] = {}
        if block.kind is BlockKind.DRAFT:
            wanted = dict.fromkeys([*self.layout.embedding, *self.layout.head])
        elif block.kind is BlockKind.HEAD:
            wanted = dict.fromkeys(name for name in self.layout.head if name not in block.tensors)
        return self._resident([*wanted])

    # Running --------------------------------------------------------------------------------------------------

    def embed(self, inputs: Inputs, features: Tensor | None = None) -> Tensor:
        """The input of the first decoder layer; call inside `entry()`. `features` are the merger's output."""
        return self.meta_model.embed(self._there(inputs), features)

    def patches(self, inputs: Inputs) -> Tensor:
        """The input of the first vision block (patches, width); call inside `pixels()`."""
        pixels = {name: value.to(self.device) for name, value in inputs.items()}
        return self.meta_model.patches(pixels)

    def run_block(self, index: int, module: nn.Module, hidden: Tensor, inputs: Inputs) -> Tensor:
        """The output of a block; differentiable in `hidden`.

        A draft head returns the input of the output head, for one token less; an output head returns logits. Call both
        inside `beside(index)`.
        """
        kind, inputs = self.layout.blocks[index].kind, self._there(inputs)
        if kind is BlockKind.DECODER:
            return self.meta_model.run_layer(index - self._first_decoder, module, hidden, inputs)
        if kind is BlockKind.VISION:
            return self.meta_model.run_vision(index, module, hidden, inputs)
        if kind is BlockKind.MERGER:
            return cast(Tensor, module(hidden))
        if kind is BlockKind.DRAFT:
            return cast(DraftHead, module).run(self.meta_model, hidden, inputs)
        head = cast(Callable[[Tensor], Tensor], module[self.head_name])  # type: ignore[index]
        return self.meta_model.logits(hidden, head)

    def folds(self, index: int, module: nn.Module, hidden: Tensor, inputs: Inputs) -> tuple[Fold, ...]:
        """The folds of a loaded block, proven on the first tokens of a microbatch; on all of it where it has images."""
        if PIXELS not in inputs:
            few = (slice(_PROVING[0]), slice(_PROVING[1]))
            hidden, inputs = hidden[few], {name: value[few] for name, value in inputs.items()}
        return folds_of(module, hidden, lambda x: self.run_block(index, module, x, inputs))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (sequences, tokens, vocabulary) for the output of the last decoder layer; call inside `exit()`."""
        return self.meta_model.logits(hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of the last decoder layer's output: the input of the output head. Call inside `exit()`."""
        return self.meta_model.normed(hidden)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Logits for the output of a draft head; call inside `beside` of it."""
        return cast(Tensor, self.meta_model.model.get_output_embeddings()(hidden))

    def _there(self, inputs: Inputs) -> Inputs:
        """Inputs on the device, moved once for all blocks; pixels, which are large, each time and not kept."""
        kept = self._inputs.get(id(inputs))
        if kept is None or kept[0] is not inputs:
            kept = inputs, {name: value.to(self.device) for name, value in inputs.items() if name != PIXELS}
            self._inputs[id(inputs)] = kept
        return {**kept[1], PIXELS: inputs[PIXELS].to(self.device)} if PIXELS in inputs else kept[1]

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        weights = self.checkpoint.read(names)
        check_finite(weights, self.checkpoint.store.uri)
        return {name: tensor.to(self.dtype) for name, tensor in weights.items()}

    @contextmanager
    def _resident(self, names: Sequence[str]) -> Iterator[None]:
        model = self.meta_model.model
        read = self._read(names)
        weights = {name: nn.Parameter(self.copies.take(t), requires_grad=False) for name, t in read.items()}
        # A tied head is the same parameter under two owners; both must see the loaded one.
        own = self.meta_model.parameter_of
        by_identity = {id(model.get_parameter(own.get(name, name))): value for name, value in weights.items()}
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
        if tensor.is_floating_point() and not all_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"{where}: {name} holds {count} NaN or infinite values; the checkpoint is damaged")
