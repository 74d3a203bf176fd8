"""Which formats a fused group can take: by shape, and by the runtime's loaders."""

from __future__ import annotations

from collections.abc import Sequence

from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Format
from prismaquant_ray.layout import FusedGroup, LinearSpec


def refusal(name: FormatName, group: FusedGroup) -> str | None:
    """Why a fused group cannot take a format, or None: the first member's reason that has one."""
    spec = FORMATS[name]
    if group.experts is not None and spec.experts_refused is not None:
        return spec.experts_refused
    if group.head and spec.head_refused is not None:
        return spec.head_refused
    if group.experts is not None and spec.scheme is not None:
        # vLLM takes one scheme for all projections of a layer's experts.
        fitting = (linear for linear in group.linears if spec.refusal(*_shape(linear)) is None)
        schemes = {str(spec.scheme(linear.in_features)) for linear in fitting}
        if len(schemes) > 1:
            return "the experts' projections would have different group sizes"
    reasons = (spec.refusal(*_shape(linear)) for linear in group.linears)
    return next((reason for reason in reasons if reason), None) or _misaligned(spec, group)


def _misaligned(spec: Format, group: FusedGroup) -> str | None:
    """Where a block of rows would reach from a member of a matrix into the next one, which vLLM refuses.

    The last one may end within a block; of experts, whose gate and up a server splits, none may.
    """
    rows = 1 if spec.codec is None else spec.codec.rows
    for matrix in group.matrices:
        fused = len(matrix.linears) > 1
        for linear in matrix.linears if group.experts is not None and fused else matrix.linears[:-1]:
            if linear.out_features % rows:
                return f"out_features {linear.out_features} of a fused matrix is not a multiple of {rows}"
    return None


def formats_of(group: FusedGroup, formats: Sequence[FormatName]) -> tuple[FormatName, ...]:
    """The formats, in the given order, that every member of a fused group can take."""
    return tuple(name for name in formats if refusal(name, group) is None)


def _shape(linear: LinearSpec) -> tuple[int, int]:
    return linear.out_features, linear.in_features
