"""What blocks hand on beside one hidden state, as one row a token.

Some decoders carry several streams, give each layer an input of its own, or let layers read the keys and values of an
earlier one (Gemma 3n, Gemma 4). All of it has a row per token. Side by side in one tensor it is stored, sent and
differentiated like any hidden state, so that neither passes nor workers know of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: The arguments of a call: positional ones and those by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: A tensor in the mappings that layers share: which mapping, the key, and the place in the value.
Entry = tuple[int, Any, int]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor's shape without its sequences and tokens, and at which axes these are.

    Without an axis of sequences it is the same for all of them.
    """

    axes: tuple[int | None, int]
    sizes: tuple[int, ...]

    @classmethod
    def between(cls, one: Tensor, other: Tensor, counts: Sequence[tuple[int, int]]) -> Part | None:
        """From one tensor for two numbers of (sequences, tokens) each; None where it has no row a token."""
        shapes = [*zip(one.shape, other.shape, strict=True)]
        sequences, tokens = ([axis for axis, pair in enumerate(shapes) if pair == count] for count in counts)
        rest = [size for size, again in shapes if size == again]
        if len(sequences) > 1 or len(tokens) != 1 or len(rest) != len(shapes) - len(sequences) - 1:
            return None
        return cls((sequences[0] if sequences else None, tokens[0]), tuple(rest))

    @property
    def width(self) -> int:
        """Values a token."""
        return math.prod(self.sizes)

    def flat(self, tensor: Tensor, sequences: int) -> Tensor:
        """As rows (sequences, tokens, width)."""
        first, second = self.axes
        if first is None:
            rows = tensor.movedim(second, 0).unsqueeze(0).expand(sequences, -1, *self.sizes)
        else:
            rows = tensor.movedim((first, second), (0, 1))
        return rows.reshape(*rows.shape[:2], self.width)

    def whole(self, rows: Tensor) -> Tensor:
        """The tensor of its rows."""
        parted = rows.reshape(*rows.shape[:2], *self.sizes)
        first, second = self.axes
        return parted[0].movedim(0, second) if first is None else parted.movedim((0, 1), (first, second))


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """How one row a token is put together.

    `parts` are its tensors in order, the first being what a layer takes first. `arguments` says which part another
    argument of a layer is, by layer and place among the leaves of the call; `shared` which one an entry of a shared
    mapping is, and `writers` the layers that leave it there.
    """

    parts: tuple[Part, ...]
    arguments: Mapping[tuple[int, int], int]
    shared: Mapping[Entry, int]
    writers: Mapping[Entry, frozenset[int]]

    @property
    def width(self) -> int:
        """Values a token."""
        return sum(part.width for part in self.parts)

    @property
    def described(self) -> str:
        """What a row holds, for people."""
        streams = math.prod(self.parts[0].sizes[:-1])
        inputs, left = len({*self.arguments.values()}), len(self.shared)
        found = [
            *([f"{streams} streams"] if streams > 1 else ["a hidden state"]),
            *([f"{inputs} inputs of layers"] if inputs else []),
            *([f"{left} keys and values that later layers read"] if left else []),
        ]
        return ", ".join(found)

    def enter(self, hidden: Tensor, calls: Sequence[Arguments]) -> Tensor:
        """The row that enters the first layer, by the arguments of every layer; nothing is shared yet."""
        leaves = [leaves_of(call)[0] for call in calls]
        sequences, tokens = (hidden.shape[axis] for axis in self.parts[0].axes if axis is not None)
        rows = {0: self.parts[0].flat(hidden, sequences)}
        rows |= {n: self.parts[n].flat(leaves[layer][place], sequences) for (layer, place), n in self.arguments.items()}
        rows |= {n: rows[0].new_zeros(sequences, tokens, self.parts[n].width) for n in self.shared.values()}
        return torch.cat([rows[n] for n in range(len(self.parts))], -1)

    def hidden_of(self, row: Tensor) -> Tensor:
        """What a layer takes first, or the last one leaves."""
        return self.parts[0].whole(row[..., : self.parts[0].width])

    def run(self, index: int, layer: Callable[..., Any], row: Tensor, call: Arguments) -> Tensor:
        """The row behind decoder layer `index`, which the model calls with these arguments."""
        rows = list(row.split([part.width for part in self.parts], -1))
        leaves, spec = leaves_of(call)
        for (owner, place), n in self.arguments.items():
            if owner == index:
                leaves[place] = self.parts[n].whole(rows[n])
        mappings = [leaf for leaf in leaves if _is_shared(leaf)]
        for (mapping, key, _), n in self.shared.items():
            if min(self.writers[mapping, key, 0]) < index:
                mappings[mapping][key] = (*mappings[mapping].get(key, ()), self.parts[n].whole(rows[n]))
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        output = layer(self.hidden_of(row), *args, **kwargs)
        rows[0] = self.parts[0].flat(output[0] if isinstance(output, tuple) else output, len(row))
        for (mapping, key, place), n in self.shared.items():
            if index in self.writers[mapping, key, place]:
                rows[n] = self.parts[n].flat(mappings[mapping][key][place], len(row))
        return torch.cat(rows, -1)


def leaves_of(call: Arguments) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call's arguments; a mapping that layers share is one."""
    return pytree.tree_flatten(call, is_leaf=_is_shared)


def _is_shared(leaf: Any) -> bool:
    # transformers' is no dict, lest a library takes it apart.
    return isinstance(leaf, MutableMapping) and not isinstance(leaf, dict)


def shares_mapping(call: Arguments) -> bool:
    """Whether layers share a mapping, which each may change."""
    return any(_is_shared(leaf) for leaf in leaves_of(call)[0])


def shared_entries(call: Arguments) -> dict[Entry, Tensor]:
    """Every tensor in the mappings that layers share."""
    mappings = [leaf for leaf in leaves_of(call)[0] if _is_shared(leaf)]
    return {
        (number, key, place): tensor
        for number, mapping in enumerate(mappings)
        for key, value in mapping.items()
        for place, tensor in enumerate(value)
    }
