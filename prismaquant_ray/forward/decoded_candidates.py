"""Stored candidates as the weights a runtime computes with: by parameter of a block's module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.copies import DeviceCopies
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import stack
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE
from prismaquant_ray.layout import FusedGroup, LinearSpec, Matrix

#: Shipped tensors of a block by name, in each format.
CandidateTensors = Mapping[FormatName, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decoded:
    """One fused group in one format, by parameter: weights in the BF16 they decode to, and scales of static inputs."""

    weights: dict[str, Tensor]
    input_scales: dict[str, Tensor | None]


class CandidateDecoder:
    """Decodes a block's candidates on a device; formats that share a codec share the decoded weights."""

    def __init__(self, candidates: CandidateTensors, copies: DeviceCopies) -> None:
        self.candidates = candidates
        self.copies = copies
        self._weights: dict[tuple[str, str], Tensor] = {}

    def decode(self, group: FusedGroup, name: FormatName) -> Decoded:
        """A fused group in a format that has a codec."""
        codec = FORMATS[name].codec
        assert codec is not None
        tensors = self.candidates[name]
        found = Decoded(weights={}, input_scales={})
        for matrix in group.matrices:
            scale = tensors.get(f"{matrix.linears[0].names[0]}.{INPUT_GLOBAL_SCALE}")
            for parameter, linears in members(matrix).items():
                key = (parameter, codec.name)
                if key not in self._weights:
                    # Moved as they are stored, at a third of the bytes.
                    weights = [codec.decode(self._moved(own(tensors, linear))) for linear in linears]
                    self._weights[key] = torch.cat(weights, dim=-2)
                found.weights[parameter] = self._weights[key]
                found.input_scales[parameter] = None if scale is None else self.copies.take(scale)
        return found

    def _moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {suffix: self.copies.take(tensor) for suffix, tensor in tensors.items()}


def members(matrix: Matrix) -> dict[str, tuple[LinearSpec, ...]]:
    """The Linears of each parameter of a matrix: one, or all of them in a packed parameter."""
    if matrix.experts is not None:
        return {matrix.parameters[0]: matrix.linears}
    return {parameter: (linear,) for parameter, linear in zip(matrix.parameters, matrix.linears, strict=True)}


def own(tensors: Mapping[str, Tensor], linear: LinearSpec) -> dict[str, Tensor]:
    """A Linear's shipped tensors by suffix; those of every expert as one stack."""
    suffixes = [name.rpartition(".")[2] for name in tensors if name.rpartition(".")[0] == linear.names[0]]
    each = [{suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes} for name in linear.names]
    return each[0] if linear.experts is None else stack(each)
