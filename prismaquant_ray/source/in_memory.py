"""Tensors that were made here, as pieces to write beside those of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismaquant_ray.source.header import DTYPE_NAMES, TensorInfo
from prismaquant_ray.source.protocol import Piece

if TYPE_CHECKING:
    from typing_extensions import Buffer


class InMemory:
    """Small tensors by name; the file of each is its name."""

    divisible = False
    uri = "memory"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._data = {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
        self._tensors = tensors

    @property
    def pieces(self) -> list[Piece]:
        """All of them, in order."""
        return [(self, self._info(name, tensor)) for name, tensor in self._tensors.items()]

    def _info(self, name: str, tensor: Tensor) -> TensorInfo:
        dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        return TensorInfo(name=name, file=name, dtype=dtype, shape=shape, start=0, stop=len(self._data[name]))

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]], /) -> list[Buffer]:
        """Bytes [start, stop) of each range of a tensor."""
        return [self._data[file][start:stop] for start, stop in ranges]
