"""Factors of folds as they act on a parameter, and on the tensors that a checkpoint stores it as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prismaquant_ray.fold import Fold, FoldMember

#: Folds with their factors s, float32 (channels,) or (experts, channels).
Equalization = Sequence[tuple[Fold, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Factors:
    """What a parameter is multiplied by: `rows` (R,) or (E, R) and `columns` (C,) or (E, C), float32; None is one.

    A vector has columns only. `shift` is as in `FoldMember`.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    shift: float = 0.0

    def apply(self, parameter: Tensor, stored: torch.dtype) -> Tensor:
        """The parameter (C,), (R, C) or (E, R, C) times its factors in float32, rounded once to what is stored.

        In the parameter's own dtype and on its device. Products are in one order, so every machine has the same bits.
        """
        scaled = parameter.to(torch.float32, copy=True)
        if self.shift:
            scaled += self.shift
        if self.columns is not None:
            columns = self.columns.to(scaled.device)
            scaled *= columns.unsqueeze(-2) if columns.dim() > 1 else columns
        if self.rows is not None:
            scaled *= self.rows.to(scaled.device).unsqueeze(-1)
        if self.shift:
            scaled -= self.shift
        return scaled.to(stored).to(parameter.dtype)

    def undo(self, scaled: Tensor) -> Tensor:
        """What `apply` made of a matrix, divided by its factors again, float32. Overwrites float32."""
        found = scaled.to(torch.float32)
        if self.columns is not None:
            columns = self.columns.to(found.device)
            found = found.div_(columns.unsqueeze(-2) if columns.dim() > 1 else columns)
        if self.rows is not None:
            found = found.div_(self.rows.to(found.device).unsqueeze(-1))
        return found

    def change(self, scaled: Tensor, parameter: Tensor) -> Tensor:
        """ΔW for an input x / s (…, O, I): what `apply` made of a matrix W, rows as in W, minus W · s. In W's dtype."""
        found = scaled.to(torch.float32)
        if self.rows is not None:
            found = found.div_(self.rows.unsqueeze(-1)) if found is not scaled else found / self.rows.unsqueeze(-1)
        if self.columns is None:
            return found.sub(parameter).to(parameter.dtype)
        columns = self.columns.unsqueeze(-2) if self.columns.dim() > 1 else self.columns
        return found.sub(parameter * columns).to(parameter.dtype)

    def to(self, device: torch.device) -> Factors:
        """On a device."""
        rows, columns = (None if each is None else each.to(device) for each in (self.rows, self.columns))
        return replace(self, rows=rows, columns=columns)

    def of(self, at: int | slice) -> Factors:
        """Of an expert of a stack, or of some."""
        parts = [each[at] if each is not None and each.dim() > 1 else each for each in (self.rows, self.columns)]
        return replace(self, rows=parts[0], columns=parts[1])

    def some_rows(self, rows: slice) -> Factors:
        """Of these rows of a matrix."""
        return replace(self, rows=None if self.rows is None else self.rows[..., rows])

    def tensors(self, shapes: Sequence[tuple[int, ...]], experts: int | None) -> list[Factors]:
        """Of the tensors (…, R, C) that are concatenated along their rows to the parameter, in this order.

        Each holds all of it, or rows of one expert.
        """
        if len(shapes) == 1:
            return [self]
        total = sum(shape[0] for shape in shapes)
        of_expert = total // (experts or 1)
        found, start = [], 0
        for shape in shapes:
            expert, first = divmod(start, of_expert)
            found.append(self.of(expert).some_rows(slice(first, first + shape[0])))
            start += shape[0]
        return found


#: Of a block without folds.
NO_FACTORS: Mapping[str, Factors] = {}


def expanded(member: FoldMember, factors: Tensor) -> Tensor:
    """Factors (…, channels) for every place of the axis of a member (…, places)."""
    if member.repeats > 1:
        heads = factors.unflatten(-1, (-1, member.width))
        factors = heads.repeat_interleave(member.repeats, dim=-2).flatten(-2)
    if member.start:
        factors = torch.cat([torch.ones_like(factors[..., :1]).expand(*factors.shape[:-1], member.start), factors], -1)
    return factors


def pooled(member: FoldMember, values: Tensor) -> Tensor:
    """The mean over the places (…, places) that share a channel of a member (…, channels)."""
    if member.repeats == 1:
        return values
    heads: Tensor = values.unflatten(-1, (-1, member.repeats, member.width)).mean(-2)
    return heads.flatten(-2)


def factors_of(equalization: Equalization) -> dict[str, Factors]:
    """The factors of every parameter that folds touch."""
    found: dict[str, Factors] = {}
    for fold, s in equalization:
        for member, factors in _members(fold, s):
            before = found.get(member.parameter, Factors())
            along = expanded(member, factors)
            # Folds touch one axis of a parameter each.
            changed = replace(before, rows=along) if member.axis == -2 else replace(before, columns=along)
            found[member.parameter] = replace(changed, shift=before.shift or member.shift)
    return found


def _members(fold: Fold, s: Tensor) -> Iterable[tuple[FoldMember, Tensor]]:
    yield from ((member, 1 / s) for member in fold.divided)
    yield from ((member, s) for member in fold.multiplied)
