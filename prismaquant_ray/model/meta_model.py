"""A transformers model without weights, whose layers are replaced by stubs.

The model's own `forward` computes masks, rotary tables, embedding scales, soft-capping and where images go; a stub
injects the hidden state where a block is to run and stops the pass behind it. So blocks run one at a time, exactly as
in the whole model, whatever the architecture. Modules before the block are not loaded: they return a tensor of the
right shape, which the stub ignores.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
        #: Whether the layer returns a tuple, whose first entry is the hidden state.
        self.as_tuple = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        result: Tensor = hidden if self.act is None else self.act(hidden, *args, **kwargs)
        return (result,) if self.as_tuple else result


class MetaModel:
    """A language model on the meta device, run one block at a time.

    `blocks_path` names the layer list (e.g. "model.layers"), `dtype` is what it computes in. Hidden states are
    (sequences, tokens, hidden_size), those of the vision tower (patches, width).
    """

    def __init__(
        self,
        config: Any,
        architecture: str,
        *,
        blocks_path: str | None = None,
        vision: Vision | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.model = build_on_meta(config, architecture, dtype)
        self.blocks_path = blocks_path or decoder_layers(self.model, config)
        #: Shapes of every parameter and persistent buffer, by name.
        self.state = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        #: Parameters outside the blocks by the checkpoint's names, where these differ.
        self.parameter_of: dict[str, str] = {}
        self.layers, self._stubs = _stubbed(self.model, self.blocks_path)
        embedding = self.model.get_input_embeddings()
        #: Paths of the modules with parameters that run before the first layer.
        self.entry = tuple(path for path, module in self.model.named_modules() if module is embedding)
        self.vision = vision
        if vision is not None:
            self.tower = self.model.get_submodule(vision.tower)
            self.vision_layers, self._vision_stubs = _stubbed(self.tower, vision.blocks)
            self.merger = self.tower.get_submodule(vision.merger)

    def returning(self, tuples: Sequence[bool]) -> None:
        """Say of the first layers whether they return tuples."""
        for stub, as_tuple in zip(self._stubs, tuples, strict=False):
            stub.as_tuple = as_tuple

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
        with self._entered(hidden):
            return self._until(self._stubs[index], act, inputs)

    def until(self, index: int, act: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        """What `act` returns for the arguments of decoder layer `index`; the modules before it must be loaded."""
        return self._until(self._stubs[index], act, inputs)

    @contextmanager
    def _entered(self, hidden: Tensor) -> Iterator[None]:
        """What runs before the layers is not loaded: the embedding returns `hidden`, the rest zeros of its shape."""
        embedding, answered = self.model.get_input_embeddings(), hidden.detach()
        width = embedding.weight.shape[1]
        if width != hidden.shape[-1]:
            # It is projected to the layers' width, by a module that is not loaded either.
            answered = answered.new_zeros(*hidden.shape[:-1], width)
        with ExitStack() as stack:
            for path in self.entry:
                module = self.model.get_submodule(path)
                answer = (lambda *_, **__: answered) if module is embedding else _zeros_of(module, hidden.device)
                stack.enter_context(_answering(module, answer))
            yield

    def logits(self, hidden: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits for the last layer's output; pointwise in tokens. Final norm and head must be loaded.

        `head` replaces the model's own output head.
        """
        tokens = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
        stub = self._stubs[-1]
        stub.act = lambda *_, **__: hidden
        try:
            with ExitStack() as stack:
                stack.enter_context(self._entered(hidden))
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


def _zeros_of(module: Any, device: torch.device) -> Callable[..., Any]:
    """A forward that computes nothing but the shapes of what the module returns."""

    def moved(tree: Any, place: Callable[[Tensor], Tensor]) -> Any:
        return pytree.tree_map_only(Tensor, place, tree)

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = moved((args, kwargs), lambda tensor: tensor.to("meta"))
        # At a tied exit its parameters are loaded.
        state = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
        with _answering(module, functools.partial(type(module).forward, module)):
            found = torch.func.functional_call(module, state, args, kwargs)
        return moved(found, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device))

    return forward


@contextmanager
def _answering(module: Any, answer: Callable[..., Any]) -> Iterator[None]:
    """Inside the with-block the module's forward is `answer`."""
    # __dict__: setattr would register `answer` as a child when it is a module.
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = answer
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _stubbed(model: Any, path: str) -> tuple[tuple[nn.Module, ...], tuple[_Stub, ...]]:
    """Replace the members of a layer list by stubs; both, in order."""
    layers = model.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"{type(model).__name__}: {path} is not a list of layers")
    stubs = tuple(_Stub(layer) for layer in layers)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(stubs))
    return tuple(layers), stubs


def build_on_meta(config: Any, architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with meta parameters and real non-persistent buffers (rotary tables, embedding scales).

    Some buffers are rounded to `dtype`, as transformers does when it loads a model in it.

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
        model = model_class._from_config(config, dtype=dtype, **routed)
    model.eval()
    _fill_buffers(model, model)
    return model


def _fill_buffers(module: Any, owner: Any) -> bool:
    """Fill non-persistent buffers as transformers does; whether there were any in the module.

    transformers has the nearest enclosing model initialize every module, inner ones first: some fill the buffers of
    modules inside them.
    """
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        owner = module
    inside = [_fill_buffers(child, owner) for child in module.children()]
    meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    volatile = [name for name in meta if name in module._non_persistent_buffers_set]
    for name in volatile:
        buffer = torch.zeros_like(getattr(module, name), device="cpu")
        # NaN shows up in the first hidden state if the model does not fill the buffer itself.
        setattr(module, name, buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer)
    if volatile or any(inside):
        owner._init_weights(module)
        return True
    return False


def decoder_layers(model: Any, config: Any) -> str:
    """Path of the decoder's list of layers, for an architecture without a family.

    Raises:
        InputError: there is no decoder alone, or no list of layers in it.
    """
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} has an encoder before its decoder, which is not supported; use a decoder-only model")
    decoder = model.get_decoder()
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    within = f"{prefix}." if prefix else ""
    lists = {
        f"{within}{path}": len(module) for path, module in decoder.named_modules() if isinstance(module, nn.ModuleList)
    }
    if not lists:
        raise InputError(f"{name} has no list of layers, so it cannot be loaded block by block")
    wanted = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    return next((path for path, count in lists.items() if count == wanted), max(lists, key=lambda path: lists[path]))
