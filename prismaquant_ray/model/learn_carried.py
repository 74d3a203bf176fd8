"""Finding what a model's layers hand on beside one hidden state, by calling them without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.model.carried import Arguments, Carried, Entry, Part, leaves_of, shared_entries, shares_mapping
from prismaquant_ray.model.filled import filled
from prismaquant_ray.model.meta_model import MetaModel, zeros_of

# Two numbers of sequences, and of tokens: a tensor's axes that differ are theirs.
_SEQUENCES, _TOKENS = (2, 3), (8, 9)


def learn_carried(meta_model: MetaModel, *, anyhow: bool = False) -> Carried | None:
    """What the layers hand on; None where it is one hidden state alone, by the first layer or, with `anyhow`, by all.

    Raises:
        InputError: something of it has no row a token.
    """
    hidden, call = _first_call(meta_model, 0.0)
    if hidden.ndim == 3 and not anyhow and not shares_mapping(call):
        seen = [call, _first_call(meta_model, 1.0)[1]]
        if not _differ(*seen):
            return None
    one, other, loud = _observed(meta_model, 0, 0.0), _observed(meta_model, 1, 0.0), _observed(meta_model, 0, 1.0)
    parts, kind = [_part(meta_model, "what enters its layers", one.hidden, other.hidden)], one.hidden.dtype
    arguments: dict[tuple[int, int], int] = {}
    known: dict[int, int] = {}
    for layer, leaves in enumerate(zip(one.leaves, other.leaves, loud.leaves, strict=True)):
        for place, (leaf, again, changed) in enumerate(zip(*leaves, strict=True)):
            if not isinstance(leaf, Tensor) or torch.equal(leaf, changed):
                continue
            # All are alive, so none has the identity of another.
            if id(leaf) not in known:
                known[id(leaf)] = len(parts)
                parts.append(_part(meta_model, f"what layer {layer} reads beside its hidden state", leaf, again, kind))
            arguments[layer, place] = known[id(leaf)]
    writers: dict[Entry, set[int]] = {}
    shared: dict[Entry, int] = {}
    for layer, (left, again) in enumerate(zip(one.left, other.left, strict=True)):
        for entry, tensor in left.items():
            if entry not in shared:
                shared[entry] = len(parts)
                parts.append(_part(meta_model, f"what layer {layer} leaves for later ones", tensor, again[entry], kind))
            writers.setdefault(entry, set()).add(layer)
    if hidden.ndim == 3 and len(parts) == 1:
        return None
    return Carried(
        parts=tuple(parts),
        arguments=arguments,
        shared=shared,
        writers={entry: frozenset(layers) for entry, layers in writers.items()},
    )


def reads_weights(meta_model: MetaModel) -> bool:
    """Whether other arguments of a layer than its hidden state depend on the weights before the first layer.

    Call it when the model knows what its layers return.
    """
    seen = []
    for value in (0.0, 1.0):
        with filled(meta_model.model, value):
            seen.append(meta_model.calls(_inputs(0))[1])
    return any(_differ(*calls) for calls in zip(*seen, strict=True))


def _differ(one: Arguments, other: Arguments) -> bool:
    pairs = zip(leaves_of(one)[0], leaves_of(other)[0], strict=True)
    return any(isinstance(leaf, Tensor) and not torch.equal(leaf, changed) for leaf, changed in pairs)


def _first_call(meta_model: MetaModel, value: float) -> tuple[Tensor, Arguments]:
    """What enters layer 0, and its other arguments, where weights are `value`."""
    found: list[Arguments] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append((args, kwargs))
        return hidden

    with filled(meta_model.model, value):
        hidden = meta_model.until(0, record, _inputs(0))
    return hidden, found[0]


@dataclass(frozen=True, slots=True)
class _Observed:
    """What layer 0 takes first; of every layer the leaves of its other arguments, and what it left in a mapping."""

    hidden: Tensor
    leaves: Sequence[list[Any]]
    left: Sequence[Mapping[Entry, Tensor]]


def _observed(meta_model: MetaModel, which: int, value: float) -> _Observed:
    leaves: list[list[Any]] = []
    left: list[Mapping[Entry, Tensor]] = []

    def run(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = args, kwargs
        leaves.append(leaves_of(call)[0])
        before = shared_entries(call)
        # Its own buffers are not on the meta device.
        layer = copy.deepcopy(meta_model.layers[index]).to("meta")
        output = zeros_of(layer, hidden.device)(hidden, *args, **kwargs)
        left.append({entry: one for entry, one in shared_entries(call).items() if before.get(entry) is not one})
        return output

    with filled(meta_model.model, value):
        hidden, _ = meta_model.calls(_inputs(which), run)
    return _Observed(hidden, leaves, left)


def _inputs(which: int) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(_SEQUENCES[which], _TOKENS[which], dtype=torch.long)}


def _part(meta_model: MetaModel, what: str, one: Tensor, other: Tensor, kind: torch.dtype | None = None) -> Part:
    part = Part.between(one, other, (_SEQUENCES, _TOKENS))
    if part is None or (kind is None and part.axes[0] is None) or one.dtype != (kind or one.dtype):
        raise InputError(
            f"{type(meta_model.model).__name__}: {what} has shape {tuple(one.shape)} and type {one.dtype} for "
            f"{_SEQUENCES[0]} sequences of {_TOKENS[0]} tokens, not a row a token of the hidden state's type, which is "
            "not supported"
        )
    return part
