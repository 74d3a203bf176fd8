"""Weights that an FP8 source has as FP8_BLOCK ships them: codes and scales pass through as they are.

A source's weight is code · scale, rounded to BF16, which is nearer to the code under its scale than half the distance
to the next one. Rounding to the nearest under the source's scales therefore gives its codes again, bit by bit, and the
weight that they decode to is the source's: nothing is lost, and nothing else has to be read twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fp8_block import CODEC, SIZE
from prismaquant_ray.layout import Block, Matrix
from prismaquant_ray.source.header import as_tensor
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.source.ranges import read_pieces

# Between these BF16 holds every code times a scale with all of its digits, and a server's kernels take the scale.
_LEAST, _MOST = 2.0**-100, 2.0**100


def passed_scales(source: TensorSource, matrix: Matrix) -> list[Tensor] | None:
    """The source's scales of each row of each Linear of a matrix, (O, G) or (E, O, G), float32.

    None where the files have another form of any of it, or scales that no code can be found under: the fused matrix
    is then rounded as any other.
    """
    if not all(_has_blocks(source, name) for name in _names(matrix)):
        return None
    stored = stored_scales(source, _names(matrix))
    if not all(bool(((scale >= _LEAST) & (scale <= _MOST)).all()) for scale in stored.values()):
        return None
    found = []
    for linear in matrix.linears:
        scales = [CODEC.of_rows(stored[name], linear.out_features) for name in linear.sources]
        found.append(scales[0] if linear.experts is None else torch.stack(scales))
    return found


def stored_scales(source: TensorSource, names: Sequence[str]) -> dict[str, Tensor]:
    """Scales of blocks by weight, float32 (⌈O/128⌉, I/128); each weight is one of `source.blocks`."""
    owner = {source.blocks[name].scale.name: name for name in names}
    pieces = read_pieces((source.store, source.blocks[name].scale) for name in names)
    return {owner[info.name]: as_tensor(data, info.dtype, info.shape).float() for info, data in pieces}


def kept_parameters(source: TensorSource, block: Block, formats: Sequence[FormatName]) -> set[str]:
    """Parameters of a block that no factors may change, because their weights can pass through."""
    if not any(FORMATS[name].codec is CODEC for name in formats):
        return set()
    passed = {name for group in block.groups for matrix in group.matrices for name in _names(matrix)}
    passed = {name for name in passed if _has_blocks(source, name)}
    return {parameter.name for parameter in block.parameters if not passed.isdisjoint(parameter.tensors)}


def _names(matrix: Matrix) -> list[str]:
    return [name for linear in matrix.linears for name in linear.sources]


def _has_blocks(source: TensorSource, name: str) -> bool:
    scaled = source.blocks.get(name)
    return scaled is not None and scaled.block == (SIZE, SIZE) and len(scaled.weight.shape) == 2
