"""INT4 (W4A16): 4-bit integers with a BF16 scale per 128 columns, or per 64 or 32 where 128 does not divide.

Tensors: `weight_packed` I32 (O, I/8), eight codes per word, lowest first, offset 8; `weight_scale` BF16
(O, I/width); `weight_shape` I64 (2,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import Format, Rounded, Served, Tensors, in_float32
from prismaquant_ray.formats.channel import Bf16ScaleCodec
from prismaquant_ray.formats.grids import Grid, pack_nibbles, unpack_nibbles

WIDTHS = (128, 64, 32)


class Int4Codec(Bf16ScaleCodec):
    """Integers −8…7 under BF16 scales."""

    name = "int4"
    widths = WIDTHS
    code_bits = 4
    # compressed-tensors maps amax to half the range of 16 codes.
    grid_max = 7.5
    # Steps of one everywhere.
    grid = Grid(-8.0, 7.0, 8.0, 0.125)
    multiple = WIDTHS[-1]

    def width(self, in_features: int) -> int:
        """The widest of 128, 64, 32 that divides the row."""
        return next(width for width in WIDTHS if in_features % width == 0)

    def round(self, x: Tensor) -> Tensor:
        """Nearest integer in −8…7, ties to even: the grid's values, by fewer operations."""
        return x.round().clamp_(-8, 7)

    def pack(self, rounded: Rounded) -> Tensors:
        """Codes, scales and the shape."""
        *experts, rows, columns = rounded.values.shape
        shape = torch.tensor((rows, columns), dtype=torch.int64).repeat(*experts, 1)
        return {**super().pack(rounded), "weight_shape": shape}

    def packed(self, values: Tensor) -> Tensor:
        """Offset-binary nibbles in 32-bit words, lowest column first."""
        return pack_nibbles(in_float32(values).add(8).to(torch.uint8)).view(torch.int32)

    def unpacked(self, codes: Tensor) -> Tensor:
        """Code − 8."""
        return unpack_nibbles(codes.view(torch.uint8), torch.arange(-8.0, 8.0, device=codes.device))


CODEC = Int4Codec()


def _scheme(in_features: int) -> tuple[dict[str, Any], None]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": CODEC.width(in_features),
        "symmetric": True,
        "dynamic": False,
    }
    return weights, None


def _modelopt(in_features: int) -> tuple[dict[str, Any], None]:
    """ModelOpt 0.47's `int4_per_block`."""
    return {"num_bits": 4, "block_sizes": {-1: CODEC.width(in_features), "type": "static"}}, None


FORMAT = Format(
    name=FormatName.INT4,
    codec=CODEC,
    compression="pack-quantized",
    scheme=_scheme,
    modelopt=_modelopt,
    summary="4-bit integer weights, BF16 scales per 128; 16-bit activations",
    letter="I",
    colours=("#cfe08a", "#1f2a00"),
    served=Served(vllm_scheme="WNA16", loads_from=75, full_from=75, shape_rule="in % 32"),
)
