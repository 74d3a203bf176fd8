"""INT3A16 (W3A16): 3-bit integers with a BF16 scale per 128 columns, or per 64 or 32 where 128 does not divide."""

from __future__ import annotations

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import Format, Served
from prismaquant_ray.formats.packed_int import PackedIntCodec, weight_scheme

CODEC = PackedIntCodec(3)
FORMAT = Format(
    name=FormatName.INT3A16,
    codec=CODEC,
    compression="pack-quantized",
    scheme=weight_scheme(CODEC),
    summary="3-bit integer weights, BF16 scales per 128; 16-bit activations",
    letter="T",
    colours=("#b9cf5e", "#1f2a00"),
    served=Served(
        vllm_scheme="WNA16",
        loads_from=75,
        full_from=75,
        shape_rule="in % 32",
        conditions="Humming alone, which the wheel for CUDA needs; without it the server ends with an error",
    ),
)
