"""A transformers model without weights, whose layers are replaced by stubs.

The model's own `forward` computes masks, rotary tables, embedding scales, soft-capping and where images go; a stub
injects the hidden state where a block is to run and stops the pass behind it. So blocks run one at a time, exactly as
in the whole model, whatever the architecture. Modules before the block are not loaded: they return a tensor of the
right shape, which the stub ignores.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prismaquant_ray.errors import InputError
from prismaquant_ray.families.base import Vision
from prismaquant_ray.model.carried import Arguments, Carried
from prismaquant_ray.model.on_meta import build_on_meta, decoder_layers, place

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
        #: How many entries the tuple has that the layer returns, the first being the hidden state; 0 for a tensor.
        self.entries = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        result: Tensor = hidden if self.act is None else self.act(hidden, *args, **kwargs)
        return (result, *[None] * (self.entries - 1)) if self.entries else result


class MetaModel:
    """A language model on the meta device, run one block at a time.

    `blocks_path` names the layer list (e.g. "model.layers"), `dtype` is what it computes in. Hidden states are
    (sequences, tokens, hidden_size), those of the vision tower (patches, width). Where `carried` is set, a row of the
    decoder's has more than the hidden state.
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
        #: None where layers hand on one hidden state alone.
        self.carried: Carried | None = None
        # Where the model says that it is.
        self._device = torch.device("meta")
        # What the embedding returns where it is not loaded.
        self._answer: tuple[tuple[Any, ...], Tensor] | None = None
        # Of parameters on the meta device, by identity.
        self._zeros: dict[tuple[int, torch.device], nn.Parameter] = {}
        self.vision = vision
        if vision is not None:
            self.tower = self.model.get_submodule(vision.tower)
            self.vision_layers, self._vision_stubs = _stubbed(self.tower, vision.blocks)
            self.merger = self.tower.get_submodule(vision.merger)

    def returning(self, entries: Sequence[int]) -> None:
        """Say of the first layers how many entries the tuples have that they return; 0 for a tensor."""
        for stub, count in zip(self._stubs, entries, strict=False):
            stub.entries = count

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
            if self.carried is not None:
                return self.carried.enter(*self.calls(inputs))
            return self._until(self._stubs[0], lambda hidden, *_, **__: hidden, inputs)

    def calls(self, inputs: Inputs, run: Callable[..., Any] | None = None) -> tuple[Tensor, list[Arguments]]:
        """What layer 0 takes first, and the other arguments of every layer; what runs before them must be loaded.

        `run` gives a layer's output for its index and arguments; without it, each returns what it takes.
        """
        entering: list[Tensor] = []
        found: list[Arguments] = []

        def act(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            entering.append(hidden)
            found.append((args, kwargs))
            output = hidden if run is None else run(len(found) - 1, hidden, *args, **kwargs)
            if len(found) == len(self._stubs):
                raise _Captured(hidden)
            return output

        for stub in self._stubs:
            stub.act = act
        try:
            self._forward(inputs)
        finally:
            for stub in self._stubs:
                stub.act = None
        return entering[0], found

    def run_layer(self, index: int, layer: Callable[..., Any], hidden: Tensor, inputs: Inputs) -> Tensor:
        """The output of `layer` for `hidden`, called as the model calls decoder layer `index`."""

        def act(_: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.carried is not None:
                return self.carried.run(index, layer, hidden, (args, kwargs))
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
        """What runs before the layers is not loaded, and answers with tensors of the right shape."""
        embedding = self.model.get_input_embeddings()
        answered = self._scratch((*hidden.shape[:-1], embedding.weight.shape[1]), hidden)
        with ExitStack() as stack:
            for path in self.entry:
                module = self.model.get_submodule(path)
                # What the layers are in has weights of its own, but runs.
                if not f"{self.blocks_path}.".startswith(f"{path}." if path else ""):
                    answer = (lambda *_, **__: answered) if module is embedding else zeros_of(module, hidden.device)
                    stack.enter_context(_answering(module, answer))
                stack.enter_context(self._hollow(module, hidden.device))
            yield

    def _scratch(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor that nobody reads. Not `like` itself: some models scale what the embedding returns in place."""
        key, size = (like.dtype, like.device), math.prod(shape)
        if self._answer is None or self._answer[0] != key or len(self._answer[1]) < size:
            self._answer = key, like.new_zeros(size)
        return self._answer[1][:size].view(shape)

    @contextmanager
    def _hollow(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        """Weights of a module that is not loaded are zeros: some models read them without calling it."""
        before = {name: each for name, each in module.named_parameters(recurse=False) if each.is_meta}
        for name, parameter in before.items():
            if (id(parameter), device) not in self._zeros:
                # One number, at every place.
                zero = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
                self._zeros[id(parameter), device] = nn.Parameter(zero, requires_grad=False)
            module._parameters[name] = self._zeros[id(parameter), device]
        try:
            yield
        finally:
            module._parameters.update(before)

    def logits(self, hidden: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits for the last layer's output; pointwise in tokens. Final norm and head must be loaded.

        `head` replaces the model's own output head.
        """
        tokens = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
        stub, leaving = self._stubs[-1], hidden if self.carried is None else self.carried.hidden_of(hidden)
        stub.act = lambda *_, **__: leaving
        try:
            with ExitStack() as stack:
                stack.enter_context(self._entered(hidden))
                if head is not None:
                    stack.enter_context(_answering(self.model.get_output_embeddings(), head))
                self._place(hidden.device)
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
            return self._forward(inputs)
        finally:
            stub.act = None

    def _place(self, device: torch.device) -> None:
        if device != self._device:
            self._device = device
            place(self.model, device)

    def _forward(self, inputs: Inputs) -> Tensor:
        """What a stub stops the model's forward with."""
        self._place(next(iter(inputs.values())).device)
        try:
            self.model(use_cache=False, **inputs)
        except _Captured as captured:
            return captured.hidden
        raise InputError(f"{type(self.model).__name__}: its forward does not reach the layer that is to run")


def zeros_of(module: Any, device: torch.device) -> Callable[..., Any]:
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
