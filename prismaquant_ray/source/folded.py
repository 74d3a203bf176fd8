"""A source with the factors of folds in its tensors: what a plan copies and what its candidates were made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prismaquant_ray.factors import Equalization, Factors, factors_of
from prismaquant_ray.layout import Block
from prismaquant_ray.source.header import TensorInfo
from prismaquant_ray.source.protocol import Piece, TensorSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from prismaquant_ray.source.block_fp8 import ScaledWeight
    from prismaquant_ray.storage.prefix import Files


class FoldedSource:
    """A model that computes what `source` does, but for one rounding of every tensor that takes factors.

    `equalization` has the folds of blocks with their factors. Tensors keep their names, types and shapes.
    """

    #: Folded tensors are read whole.
    divisible = False

    def __init__(self, source: TensorSource, equalization: Iterable[tuple[Block, Equalization]]) -> None:
        self._source = source
        self._factors: dict[str, Factors] = {}
        self._transposed: set[str] = set()
        for block, folds in equalization:
            self._factors |= _by_tensor(block, factors_of(folds), source.tensors)
            self._transposed |= {name for each in block.parameters if each.transposed for name in each.tensors}

    @property
    def store(self) -> Files:
        """Where the source's files are."""
        return self._source.store

    @property
    def uri(self) -> str:
        """Where the source's files are."""
        return self._source.store.uri

    @property
    def config(self) -> dict[str, Any]:
        """The source's."""
        return self._source.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The source's."""
        return self._source.tensors

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The source's."""
        return self._source.stored

    @property
    def blocks(self) -> Mapping[str, ScaledWeight]:
        """The source's, without those that take factors."""
        return {name: scaled for name, scaled in self._source.blocks.items() if name not in self._factors}

    @property
    def folded(self) -> tuple[str, ...]:
        """Names of the tensors that take factors."""
        return tuple(self._factors)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors in their own dtype."""
        found = self._source.read(names)
        for name in found.keys() & self._factors.keys():
            tensor, factors = found[name], self._factors[name]
            # Products have the order that they have in the block's parameter.
            turned = tensor.mT if name in self._transposed else tensor
            scaled = factors.apply(turned, tensor.dtype)
            found[name] = (scaled.mT if name in self._transposed else scaled).contiguous()
        return found

    def piece(self, name: str) -> Piece:
        """A tensor's bytes, as read_pieces takes them."""
        if name not in self._factors:
            return self._source.piece(name)
        info = self.tensors[name]
        return self, TensorInfo(
            name=name, file=name, dtype=info.dtype, shape=info.shape, start=0, stop=info.stop - info.start
        )

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Bytes [start, stop) of each range of a folded tensor; a `file` is its name."""
        data = self.read([file])[file].view(-1).view(torch.uint8).numpy().data
        return [data[start:stop] for start, stop in ranges]

    def other_files(self) -> list[str]:
        """The source's."""
        return self._source.other_files()

    def fingerprint(self) -> str:
        """The source's: factors are not part of what a model is called by."""
        return self._source.fingerprint()


def _by_tensor(block: Block, factors: Mapping[str, Factors], infos: Mapping[str, TensorInfo]) -> dict[str, Factors]:
    """The factors of each checkpoint tensor of a block."""
    experts = {name: each.experts for group in block.groups for each in group.matrices for name in each.parameters}
    found: dict[str, Factors] = {}
    for parameter in block.parameters:
        if parameter.name not in factors:
            continue
        own = factors[parameter.name]
        shapes = [infos[name].shape for name in parameter.tensors]
        parts = own.tensors(shapes, experts.get(parameter.name))
        found |= dict(zip(parameter.tensors, parts, strict=True))
    return found
