"""A transformers model without weights, whose decoder layers are replaced by stubs.

The model's own `forward` computes masks, rotary tables, embedding scales and soft-capping; a stub injects the
hidden state where a block is to run and stops the pass behind it. So blocks run one at a time, exactly as in
the whole model, whatever the architecture.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from prismaquant_ray.errors import InputError


class _Captured(Exception):  # noqa: N818 - control flow, not an error
    """Carries a hidden state out of the model's forward."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Stub(nn.Module):
    """Stands in for one decoder layer: passes its input on, or does what `act` says.

    Attributes the model reads from its layers (attention_type, layer_idx, …) come from the layer it replaces.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: its parameters are not the model's any more
        self.act: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.act is None:
            return hidden
        result: Tensor = self.act(hidden, *args, **kwargs)
        return result


class Skeleton:
    """A causal language model on the meta device, run one block at a time.

    `blocks_path` names the layer list (e.g. "model.layers"). Hidden states are (sequences, tokens, hidden_size).
    """

    def __init__(self, config: Any, *, blocks_path: str | None = None) -> None:
        self.config = config
        self.model = build_on_meta(config)
        self.blocks_path = blocks_path or longest_layer_list(self.model)
        layers = self.model.get_submodule(self.blocks_path)
        if not isinstance(layers, nn.ModuleList):
            raise InputError(f"{type(self.model).__name__}: {self.blocks_path} is not a list of layers")
        self.layers = tuple(layers)
        self._stubs = tuple(_Stub(layer) for layer in self.layers)
        parent, _, leaf = self.blocks_path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, nn.ModuleList(self._stubs))

    def new_block(self, index: int) -> nn.Module:
        """A copy of decoder layer `index`, still on the meta device; weights are the caller's to load."""
        return copy.deepcopy(self.layers[index])

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters block 0 for token ids (sequences, tokens). The embedding must be loaded."""
        return self._until(0, lambda hidden, *_, **__: hidden, input_ids=tokens)

    def run_block(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """What leaves block `index` when `hidden` enters it."""

        def act(_: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = block(hidden, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        return self._until(index, act, inputs_embeds=hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits for what left the last block; pointwise in tokens. Final norm and head must be loaded."""
        stub = self._stubs[-1]
        stub.act = lambda *_, **__: hidden
        try:
            logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        finally:
            stub.act = None
        return logits

    def _until(self, index: int, act: Any, **inputs: Tensor) -> Tensor:
        def act_and_stop(*args: Any, **kwargs: Any) -> Tensor:
            raise _Captured(act(*args, **kwargs))

        stub = self._stubs[index]
        stub.act = act_and_stop
        try:
            self.model(use_cache=False, **inputs)
        except _Captured as captured:
            return captured.hidden
        finally:
            stub.act = None
        raise InputError(f"{type(self.model).__name__}: its forward does not call {self.blocks_path}.{index}")


def build_on_meta(config: Any) -> Any:
    """The model with meta parameters and real non-persistent buffers (rotary tables, embedding scales)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.eval()
    for module in model.modules():
        own = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        volatile = [name for name in own if name in module._non_persistent_buffers_set]
        for name in volatile:
            # NaN shows up in the first hidden state if the model does not fill the buffer itself.
            setattr(module, name, _unset(getattr(module, name)))
        if volatile:
            # transformers fills non-persistent buffers here after it has built a model on the meta device.
            model._init_weights(module)
    return model


def _unset(buffer: Tensor) -> Tensor:
    value = torch.empty_like(buffer, device="cpu")
    return value.fill_(float("nan")) if value.is_floating_point() else value.zero_()


def longest_layer_list(model: nn.Module) -> str:
    """Path of the ModuleList with the most members: the decoder, in every architecture without a family so far."""
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of layers, so it cannot be loaded block by block")
    _, path = max(lists, key=lambda entry: entry[0])
    return str(path)
