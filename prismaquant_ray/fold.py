"""Where a block takes a factor s per channel and stays what it is: x / s from a producer, W s in all that read it.

Which folds a block has is found by `prismaquant_ray.model.folds`, their factors by `prismaquant_ray.forward.equalize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Block


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldMember:
    """A parameter that takes factors along one axis, -1 or -2, from `start` to its end.

    `shift` is added before it is scaled and taken off afterwards: 1 for a norm that multiplies by 1 + w. Each head of
    `width` factors counts for `repeats` heads in a row, as keys and values do for their queries.
    """

    parameter: str
    axis: int
    start: int = 0
    shift: float = 0.0
    repeats: int = 1
    width: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """`channels` whose factors can be chosen: parameters that are divided by s, and those that are multiplied by it.

    Where each of `experts` has its own factors, s is (experts, channels), else (channels,).
    """

    channels: int
    divided: tuple[FoldMember, ...]
    multiplied: tuple[FoldMember, ...]
    experts: int | None = None

    @property
    def parameters(self) -> set[str]:
        """Everything that it touches."""
        return {member.parameter for member in (*self.divided, *self.multiplied)}

    def is_used(self, block: Block, choice: Mapping[str, FormatName]) -> bool:
        """Whether a plan needs it: not where everything that it touches and that may be quantized stays as it is."""
        return any(
            FORMATS[choice[group.name]].codec is not None and not self.parameters.isdisjoint(matrix.parameters)
            for group in block.groups
            for matrix in group.matrices
        )
