"""Finding the folds of a block: what is linear in its channels, and everything that reads it.

A norm's weight takes the factors of everything that reads its output; the rows of `up` those of `down`, the rows of `v`
those of `o`. No family says so: what reads what is seen while the block runs, and every fold is proven on the block's
own weights before it is used, by factors so large that a clamp, or a reader that was not seen, shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prismaquant_ray.factors import factors_of
from prismaquant_ray.fold import Fold, FoldMember
from prismaquant_ray.model.experts import is_packed, unquantizable

# Factors are powers of two up to 2^±9, farther from one than any that is used. Nothing is rounded: no bit may change.
_EXPONENT = 9
# But behind a norm of 1 + w: units of the last place, of the output and of the largest change of its channel.
_LAST_PLACES = 64


def folds_of(module: nn.Module, hidden: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[Fold, ...]:
    """Every fold of a loaded block that `run` runs on hidden states, proven. No two multiply the same columns."""
    with torch.no_grad(), _watched(module) as calls:
        expected = run(hidden)
    generator = torch.Generator().manual_seed(0)
    found: list[Fold] = []
    taken: set[tuple[str, int]] = set()
    for variants in _proposed(module, calls):
        for fold in variants:
            places = {(member.parameter, member.axis) for member in (*fold.divided, *fold.multiplied)}
            if places.isdisjoint(taken) and _holds(module, hidden, run, expected, fold, generator):
                found.append(fold)
                taken |= places
                break
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A module that owns parameters ran: its first argument and its output, kept so that their memory is theirs."""

    path: str
    module: Any
    read: Tensor
    made: Any


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def watch(path: str) -> Any:
        def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if tensors:
                calls.append(_Call(path, owner, tensors[0], output))

        return hook

    handles = [
        part.register_forward_hook(watch(path), with_kwargs=True)
        for path, part in module.named_modules()
        if any(True for _ in part.parameters(recurse=False))
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _proposed(module: nn.Module, calls: list[_Call]) -> Iterator[tuple[Fold, ...]]:
    """What may be a fold, each in variants of which one at most holds; pairs of matrices first."""
    yield from _through_products(module, calls)
    readers: dict[int, list[_Call]] = {}
    for call in calls:
        if any(parameter.dim() > 1 for parameter in call.module.parameters(recurse=False)):
            readers.setdefault(_place(call.read), []).append(call)
    for call in calls:
        vectors = [name for name, each in call.module.named_parameters(recurse=False) if each.dim() == 1]
        is_norm = "weight" in vectors and len(vectors) == sum(1 for _ in call.module.parameters(recurse=False))
        if is_norm and isinstance(call.made, Tensor) and _place(call.made) in readers:
            yield tuple(_behind_norm(call, vectors, readers[_place(call.made)]))


def _behind_norm(norm: _Call, vectors: list[str], readers: list[_Call]) -> Iterator[Fold]:
    """A norm and all that reads its output, for norms that multiply by w, and by 1 + w."""
    width = norm.module.weight.shape[0]
    multiplied = tuple(
        FoldMember(parameter=f"{reader.path}.{name}", axis=axis)
        for reader in {reader.path: reader for reader in readers}.values()
        for name, axis in _columns(reader.module, width)
    )
    for shift in (0.0, 1.0):
        divided = tuple(
            FoldMember(parameter=f"{norm.path}.{name}", axis=-1, shift=shift if name == "weight" else 0.0)
            for name in vectors
        )
        yield Fold(channels=width, divided=divided, multiplied=multiplied)


def _columns(module: Any, width: int) -> list[tuple[str, int]]:
    """Parameters that meet an input of this width, with the axis that does."""
    if is_packed(module):
        return [("gate_up_proj", -2 if module.is_transposed else -1)]
    found = ((name, each) for name, each in module.named_parameters(recurse=False) if each.dim() > 1)
    return [(name, -1) for name, each in found if each.shape[-1] == width]


def _through_products(module: nn.Module, calls: list[_Call]) -> Iterator[tuple[Fold, ...]]:
    """Pairs of matrices between which channels are only multiplied or averaged: up and down, v and o."""
    for path, part in module.named_modules():
        if is_packed(part) and unquantizable(part) is None:
            experts, _, inner = part.down_proj.shape
            yield (
                Fold(
                    channels=int(inner),
                    experts=int(experts),
                    divided=(FoldMember(parameter=f"{path}.gate_up_proj", axis=-2, start=int(inner)),),
                    multiplied=(FoldMember(parameter=f"{path}.down_proj", axis=-1),),
                ),
            )
    ran = [call for call in calls if isinstance(call.module, nn.Linear)]
    for index, last in enumerate(ran):
        parent = last.path.rpartition(".")[0]
        head_width = getattr(module.get_submodule(parent), "head_dim", None)
        siblings = [call for call in ran[:index] if call.path.rpartition(".")[0] == parent]
        # The nearest ones first: of up and gate, and of v and k, it is the later one.
        yield tuple(fold for first in reversed(siblings) for fold in _between(first, last, head_width))


def _between(first: _Call, last: _Call, head_width: int | None) -> Iterator[Fold]:
    """The rows of `first` and the columns of `last`.

    Whole; or of gate and up in one matrix the second half, of q, k and v in one matrix the end.
    """
    rows, columns = first.module.out_features, last.module.in_features
    starts = [0] if rows <= columns else [rows - columns, (rows + columns) // 2]
    for start in starts:
        channels = rows - start
        if channels < 1 or columns % channels:
            continue
        repeats = columns // channels
        if repeats > 1 and (head_width is None or channels % head_width):
            continue
        yield Fold(
            channels=channels,
            divided=tuple(
                FoldMember(parameter=f"{first.path}.{name}", axis=-2 if name == "weight" else -1, start=start)
                for name, _ in first.module.named_parameters(recurse=False)
            ),
            multiplied=(
                FoldMember(parameter=f"{last.path}.weight", axis=-1, repeats=repeats, width=head_width or 1)
                if repeats > 1
                else FoldMember(parameter=f"{last.path}.weight", axis=-1),
            ),
        )


def _place(tensor: Tensor) -> int:
    """The memory of a tensor, which its views share."""
    return tensor.untyped_storage().data_ptr()


def _holds(
    module: nn.Module,
    hidden: Tensor,
    run: Callable[[Tensor], Tensor],
    expected: Tensor,
    fold: Fold,
    generator: torch.Generator,
) -> bool:
    """Whether no bit of the block's output changes with random factors, some far from one; but with half of them.

    A pair that these tokens do not show, as in what picks the tokens that attention looks at, is not proven.
    """
    shape = (fold.channels,) if fold.experts is None else (fold.experts, fold.channels)
    shifted = any(member.shift for member in fold.divided)
    # A weight w with (1 + w) / s near zero would lose its digits in 16 bits.
    s = torch.exp2(torch.randint(-_EXPONENT, 1 if shifted else _EXPONENT + 1, shape, generator=generator).float())
    rounding = torch.zeros_like(expected)
    if shifted:
        change = expected - hidden if expected.shape == hidden.shape else expected
        change = change.abs().flatten(0, -2).amax(0)
        rounding = _LAST_PLACES * torch.finfo(expected.dtype).eps * torch.maximum(change, expected.abs())

    def stays(tried: Fold) -> bool:
        with _folded(module, tried, s), torch.no_grad():
            found = run(hidden)
        return found.shape == expected.shape and bool(((found - expected).abs() <= rounding).all())

    return stays(fold) and not stays(replace(fold, divided=()))


@contextmanager
def _folded(module: nn.Module, fold: Fold, s: Tensor) -> Iterator[None]:
    before: dict[str, Tensor] = {}
    try:
        for name, factors in factors_of([(fold, s)]).items():
            parameter = module.get_parameter(name)
            before[name] = parameter.data
            parameter.data = factors.apply(parameter.data, torch.float32)
        yield
    finally:
        for name, data in before.items():
            module.get_parameter(name).data = data
