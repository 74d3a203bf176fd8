"""A transformers model without weights, whose layers are replaced by stubs.

The model's own `forward` computes masks, rotary tables, embedding scales, soft-capping and where images go; a stub
injects the hidden state where a block is to run and stops the pass behind it. So blocks run one at a time, exactly as
in the whole model, whatever the architecture. Modules before the block are not loaded: they return a tensor of the
right shape, which the stub ignores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.families.base import Vision
from prismaquant_ray.model.experts import IMPLEMENTATION, register

#: Keyword arguments of the model's forward for one microbatch: input_ids (sequences, tokens), and those of images.
Inputs = Mapping[str, Tensor]
#: The argument that makes the model's forward run its vision tower.
PIXELS = "pixel_values"


class _Captured(Exception):  # noqa: N818 - control flow, not an error
    """Carries a hidden state out of the model's forward."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Stub(nn.Module):
    """Replaces one layer: returns its input, or the result of `act`.

    Attributes the model reads from its layers (attention_type, layer_idx, …) come from the layer it replaces.
    """

    layer: nn.Module

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Not a submodule: its parameters are not the model's any more.
        object.__setattr__(self, "layer", layer)
        self.act: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.act is None:
            return hidden
        result: Tensor = self.act(hidden, *args, **kwargs)
        return result


class MetaModel:
    """A language model on the meta device, run one block at a time.

    `blocks_path` names the layer list (e.g. "model.layers"). Hidden states are (sequences, tokens, hidden_size), those
    of the vision tower (patches, width).
    """

    def __init__(
        self, config: Any, architecture: str, *, blocks_path: str | None = None, vision: Vision | None = None
    ) -> None:
        self.config = config
        self.model = build_on_meta(config, architecture)
        self.blocks_path = blocks_path or longest_layer_list(self.model)
        self.layers, self._stubs = _stubbed(self.model, self.blocks_path)
        self.vision = vision
        if vision is not None:
            self.tower = self.model.get_submodule(vision.tower)
            self.vision_layers, self._vision_stubs = _stubbed(self.tower, vision.blocks)
            self.merger = self.tower.get_submodule(vision.merger)

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last decoder layer."""
        norm: nn.Module = self.model.get_submodule(f"{self.blocks_path.rpartition('.')[0]}.norm")
        return norm

    # Decoder --------------------------------------------------------------------------------------------------

    def new_layer(self, index: int) -> nn.Module:
        """A copy of decoder layer `index`, still on the meta device; weights are the caller's to load."""
        return copy.deepcopy(self.layers[index])

    def embed(self, inputs: Inputs, features: Tensor | None = None) -> Tensor:
        """The input of decoder layer 0. The embedding must be loaded; `features` are the merger's output."""
        with ExitStack() as stack:
            if features is None:
                inputs = {name: value for name, value in inputs.items() if name != PIXELS}
            else:
                stack.enter_context(self._passing(features))
            return self._until(self._stubs[0], lambda hidden, *_, **__: hidden, inputs)

    def run_layer(self, index: int, layer: Callable[..., Any], hidden: Tensor, inputs: Inputs) -> Tensor:
        """The output of `layer` for `hidden`, called as the model calls decoder layer `index`."""

        def act(_: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = layer(hidden, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        inputs = {name: value for name, value in inputs.items() if name != PIXELS}
        with _answering(self.model.get_input_embeddings(), lambda *_, **__: hidden.detach()):
            return self._until(self._stubs[index], act, inputs)

    def logits(self, hidden: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits for the last layer's output; pointwise in tokens. Final norm and head must be loaded.

        `head` replaces the model's own output head.
        """
        tokens = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
        stub = self._stubs[-1]
        stub.act = lambda *_, **__: hidden
        try:
            with ExitStack() as stack:
                stack.enter_context(_answering(self.model.get_input_embeddings(), lambda *_, **__: hidden.detach()))
                if head is not None:
                    stack.enter_context(_answering(self.model.get_output_embeddings(), head))
                logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            stub.act = None
        return logits

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of the last layer's output: the input of the head. The norm must be loaded."""

        def stop(x: Tensor) -> Tensor:
            raise _Captured(x)

        try:
            self.logits(hidden, stop)
        except _Captured as captured:
            return captured.hidden
        raise InputError(f"{type(self.model).__name__}: its forward does not call its output head")

    # Vision tower ---------------------------------------------------------------------------------------------

    def patches(self, inputs: Inputs) -> Tensor:
        """The input of vision block 0 (patches, width). The modules before the blocks must be loaded."""
        return self._until(self._vision_stubs[0], lambda hidden, *_, **__: hidden, inputs)

    def run_vision(self, index: int, layer: Callable[..., Any], hidden: Tensor, inputs: Inputs) -> Tensor:
        """The output of `layer` for `hidden` (patches, width), called as vision block `index`."""
        with self._passing(hidden):
            return self._until(self._vision_stubs[index], lambda _, *a, **k: layer(hidden, *a, **k), inputs)

    @contextmanager
    def _passing(self, features: Tensor) -> Iterator[None]:
        """The tower computes nothing: its entry returns zeros, its blocks their input, its merger `features`."""
        assert self.vision is not None
        width = self.config.vision_config.hidden_size

        def zeros(x: Tensor, *_: Any, **__: Any) -> Tensor:
            # One row per patch (pixels, float) or per index (positions).
            rows = x.shape[:1] if x.is_floating_point() else x.shape
            return torch.zeros(*rows, width, device=features.device)

        with ExitStack() as stack:
            for name in self.vision.entry:
                stack.enter_context(_answering(self.tower.get_submodule(name), zeros))
            stack.enter_context(_answering(self.merger, lambda *_, **__: features))
            yield

    def _until(self, stub: _Stub, act: Any, inputs: Inputs) -> Tensor:
        def act_and_stop(*args: Any, **kwargs: Any) -> Tensor:
            raise _Captured(act(*args, **kwargs))

        stub.act = act_and_stop
        try:
            self.model(use_cache=False, **inputs)
        except _Captured as captured:
            return captured.hidden
        finally:
            stub.act = None
        raise InputError(f"{type(self.model).__name__}: its forward does not reach the layer that is to run")


@contextmanager
def _answering(module: Any, answer: Callable[..., Any]) -> Iterator[None]:
    """Inside the with-block the module's forward is `answer`."""
    # __dict__: setattr would register `answer` as a child when it is a module.
    module.__dict__["forward"] = answer
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _stubbed(model: Any, path: str) -> tuple[tuple[nn.Module, ...], tuple[_Stub, ...]]:
    """Replace the members of a layer list by stubs; both, in order."""
    layers = model.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"{type(model).__name__}: {path} is not a list of layers")
    stubs = tuple(_Stub(layer) for layer in layers)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(stubs))
    return tuple(layers), stubs


def build_on_meta(config: Any, architecture: str) -> Any:
    """The model with meta parameters and real non-persistent buffers (rotary tables, embedding scales).

    Raises:
        InputError: transformers has no such class for this configuration.
    """
    import transformers

    model_class = getattr(transformers, architecture, None)
    if model_class is None or not isinstance(config, getattr(model_class, "config_class", None) or ()):
        raise InputError(f"transformers has no class {architecture} for model_type {config.model_type!r}")
    register()
    with torch.device("meta"):
        routed = {"experts_implementation": IMPLEMENTATION} if model_class._can_set_experts_implementation() else {}
        model = model_class._from_config(config, **routed)
    model.eval()
    for module in model.modules():
        meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        volatile = [name for name in meta if name in module._non_persistent_buffers_set]
        for name in volatile:
            buffer = torch.zeros_like(getattr(module, name), device="cpu")
            # NaN shows up in the first hidden state if the model does not fill the buffer itself.
            setattr(module, name, buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer)
        if volatile:
            # transformers fills non-persistent buffers here after it has built a model on the meta device.
            model._init_weights(module)
    return model


def longest_layer_list(model: nn.Module) -> str:
    """Path of the ModuleList with the most members: the decoder, in every architecture without a family so far."""
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of layers, so it cannot be loaded block by block")
    _, path = max(lists, key=lambda entry: entry[0])
    return str(path)
