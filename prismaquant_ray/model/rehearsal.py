"""A few tokens run through weights of zeros, to learn how an unknown architecture calls its layers.

Zeros cost no memory: the system maps all of them to one page. What is learned here is otherwise assumed for known
families: that only the embedding runs before the first layer, that a layer returns a tensor, and that each of its
Linears is called once, returns a tensor, and has a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.model.carried import Carried
from prismaquant_ray.model.filled import filled
from prismaquant_ray.model.learn_carried import learn_carried, reads_weights
from prismaquant_ray.model.meta_model import MetaModel

_SEQUENCES, _TOKENS = 2, 8
#: A model's code is somebody else's and may fail in any of these ways. Whoever names the model keeps the cause.
MODEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a rehearsal found of a block's Linears, by path in it.

    `kept` are those that stay, with the reason; `together` those of one module that read one tensor.
    """

    kept: Mapping[str, str] = field(default_factory=dict)
    together: tuple[tuple[str, ...], ...] = ()


#: Of a block that was not rehearsed.
NOTHING = Found()


@dataclass(frozen=True, kw_only=True, slots=True)
class RehearsedLayer:
    """How many entries the tuple has that a layer returns, 0 for a tensor; and what was found of its Linears."""

    entries: int
    found: Found


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsed:
    """Paths of the modules with parameters that run before the first layer, and behind the last; and each layer."""

    entry: tuple[str, ...]
    exit: tuple[str, ...]
    layers: tuple[RehearsedLayer, ...]


def rehearse(meta_model: MetaModel) -> Rehearsed:
    """Learn how the model runs its layers.

    Raises:
        InputError: layers share a matrix, something runs between them, what they hand on has no row a token, or the
            model does not run.
    """
    name = type(meta_model.model).__name__
    _check_own(meta_model)
    try:
        with torch.no_grad():
            entry, hidden = _entry(meta_model)
            meta_model.entry = entry
            hidden = _with_carried(meta_model, hidden, learn_carried(meta_model))
        layers = _layers(meta_model, hidden)
        with torch.no_grad():
            _check_between(meta_model)
            if meta_model.carried is None and reads_weights(meta_model):
                # Only now is it known what layers return, so that the arguments of all can be looked at.
                hidden = _with_carried(meta_model, hidden, learn_carried(meta_model, anyhow=True))
            leaving = _exit(meta_model, hidden)
    except MODEL_ERRORS as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name} cannot be run layer by layer: a few tokens on weights of zeros end with {type(error).__name__} "
            f"({text}); this architecture is not supported"
        ) from error
    return Rehearsed(entry=entry, exit=leaving, layers=layers)


def _with_carried(meta_model: MetaModel, hidden: Tensor, carried: Carried | None) -> Tensor:
    """Have the model carry this; what then enters the first layer."""
    meta_model.carried = carried
    if carried is None:
        return hidden
    with filled(meta_model.model, 0.0):
        return meta_model.embed(_inputs())


def _check_own(meta_model: MetaModel) -> None:
    """InputError where a parameter is that of two layers: it would be priced in each, and rounded for one."""
    owners: dict[int, tuple[int, str]] = {}
    for index, layer in enumerate(meta_model.layers):
        for path, parameter in layer.named_parameters():
            owner, other = owners.setdefault(id(parameter), (index, path))
            if owner != index:
                raise InputError(
                    f"{type(meta_model.model).__name__}: layers {owner} and {index} share {other}; a matrix that is "
                    "used in two layers is not supported"
                )


def _check_between(meta_model: MetaModel) -> None:
    """InputError where modules run between the layers: they would belong to no block."""
    with filled(meta_model.model, 0.0), _running(meta_model.model) as found:
        meta_model.calls(_inputs())
    between = [path for path in found if path not in meta_model.entry]
    if between:
        raise InputError(
            f"{type(meta_model.model).__name__}: {between[0]} runs between the layers of {meta_model.blocks_path}, "
            "which is not supported"
        )


def _inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(_SEQUENCES, _TOKENS, dtype=torch.long)}


def _entry(meta_model: MetaModel) -> tuple[tuple[str, ...], Tensor]:
    """What runs before the first layer, and the hidden state it makes."""
    with filled(meta_model.model, 0.0), _running(meta_model.model) as found:
        hidden = meta_model.embed(_inputs())
    return tuple(found), hidden


def _exit(meta_model: MetaModel, hidden: Tensor) -> tuple[str, ...]:
    """What runs behind the last layer."""
    with filled(meta_model.model, 0.0), _running(meta_model.model) as found:
        meta_model.logits(hidden)
    return tuple(path for path in found if path not in meta_model.entry)


@contextmanager
def _running(model: nn.Module) -> Iterator[dict[str, None]]:
    """Paths of the modules with parameters of their own that run inside the with-block, in order."""
    found: dict[str, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: found.setdefault(path))
        for path, module in model.named_modules()
        if _owns(module)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _layers(meta_model: MetaModel, hidden: Tensor) -> tuple[RehearsedLayer, ...]:
    """Every layer; equal ones are run once."""
    known: dict[Any, RehearsedLayer] = {}
    found: list[RehearsedLayer] = []
    for index, layer in enumerate(meta_model.layers):
        kind = type(layer), tuple((name, tuple(tensor.shape)) for name, tensor in layer.named_parameters())
        if kind not in known:
            known[kind] = _run(meta_model, index, layer, hidden)
        found.append(known[kind])
        # The model hands a layer's output to the next one in the layer's own form.
        meta_model.returning([each.entries for each in found])
    return tuple(found)


def _run(meta_model: MetaModel, index: int, layer: nn.Module, hidden: Tensor) -> RehearsedLayer:
    """Run a layer with a graph, and ask where gradients arrive: the graph has them, though all are zero."""
    loaded, outputs, answers = copy.deepcopy(layer), dict[str, Any](), list[int]()
    inputs: dict[str, Tensor] = {}
    again: set[str] = set()
    linears = {path: module for path, module in loaded.named_modules() if isinstance(module, nn.Linear)}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if path in outputs:
                again.add(path)
            outputs[path] = output
            inputs[path] = args[0]

        return hook

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = loaded(x, *args, **kwargs)
        answers.append(len(output) if isinstance(output, tuple) else 0)
        return output

    for path, module in linears.items():
        module.register_forward_hook(note(path))
    entering = hidden.detach().requires_grad_()
    with filled(loaded, 0.0), torch.enable_grad():
        leaving = meta_model.run_layer(index, run, entering, _inputs())
    tensors = {path: output for path, output in outputs.items() if isinstance(output, Tensor) and output.requires_grad}
    reached: set[str] = set()
    if tensors and leaving.requires_grad:
        gradients = torch.autograd.grad(leaving, [*tensors.values()], torch.ones_like(leaving), allow_unused=True)
        reached = {path for path, gradient in zip(tensors, gradients, strict=True) if gradient is not None}
    # Of experts that are modules each, a few tokens reach a few: they are all alike.
    called, differentiable = ({_alike(path) for path in paths} for paths in (outputs, reached))
    kept = {}
    for path in linears:
        if _alike(path) not in called:
            kept[path] = "its code does not call it"
        elif path in again:
            kept[path] = "its code calls it more than once"
        elif path in outputs and not isinstance(outputs[path], Tensor):
            kept[path] = "it does not return a tensor alone"
        elif _alike(path) not in differentiable:
            kept[path] = "no gradient passes through it, so it cannot be priced"
    return RehearsedLayer(entries=answers[0], found=Found(kept=kept, together=_together(inputs)))


def _together(inputs: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Linears of one module that read one tensor."""
    found: dict[tuple[str, int], list[str]] = {}
    for path, tensor in inputs.items():
        # All are alive, so none has the identity of another.
        found.setdefault((path.rpartition(".")[0], id(tensor)), []).append(path)
    return tuple(tuple(paths) for paths in found.values() if len(paths) > 1)


def _alike(path: str) -> str:
    """A path without the numbers in it."""
    return ".".join("{}" if part.isdecimal() else part for part in path.split("."))
