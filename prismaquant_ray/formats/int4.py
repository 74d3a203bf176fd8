"""INT4 (W4A16): 4-bit integers with a BF16 scale per 128 columns, or per 64 or 32 where 128 does not divide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import Format, Served, in_float32
from prismaquant_ray.formats.grids import pack_nibbles, unpack_nibbles
from prismaquant_ray.formats.packed_int import PackedIntCodec, weight_scheme


class Int4Codec(PackedIntCodec):
    """Integers −8…7, packed by fewer operations."""

    def packed(self, values: Tensor) -> Tensor:
        """Offset-binary nibbles in 32-bit words, lowest column first."""
        return pack_nibbles(in_float32(values).add(8).to(torch.uint8)).view(torch.int32)

    def unpacked(self, codes: Tensor) -> Tensor:
        """Code − 8."""
        return unpack_nibbles(codes.view(torch.uint8), torch.arange(-8.0, 8.0, device=codes.device))


CODEC = Int4Codec(4)


def _modelopt(in_features: int) -> tuple[dict[str, Any], None]:
    """ModelOpt 0.47's `int4_per_block`."""
    return {"num_bits": 4, "block_sizes": {-1: CODEC.width(in_features), "type": "static"}}, None


FORMAT = Format(
    name=FormatName.INT4,
    codec=CODEC,
    compression="pack-quantized",
    scheme=weight_scheme(CODEC),
    modelopt=_modelopt,
    summary="4-bit integer weights, BF16 scales per 128; 16-bit activations",
    letter="I",
    colours=("#cfe08a", "#1f2a00"),
    served=Served(
        vllm_scheme="WNA16",
        loads_from=75,
        full_from=75,
        shape_rule="in % 32",
        conditions="Machete on SM90, else Marlin; without a kernel the server ends",
    ),
)
