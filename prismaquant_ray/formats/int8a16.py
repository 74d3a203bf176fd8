"""INT8A16 (W8A16): 8-bit integers with a BF16 scale per 128 columns, or per 64 or 32 where 128 does not divide."""

from __future__ import annotations

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import Format, Served
from prismaquant_ray.formats.packed_int import PackedIntCodec, weight_scheme

CODEC = PackedIntCodec(8)
FORMAT = Format(
    name=FormatName.INT8A16,
    codec=CODEC,
    compression="pack-quantized",
    scheme=weight_scheme(CODEC),
    summary="8-bit integer weights, BF16 scales per 128; 16-bit activations",
    letter="G",
    colours=("#f3b184", "#331500"),
    served=Served(
        vllm_scheme="WNA16",
        loads_from=75,
        full_from=75,
        shape_rule="in % 32",
        conditions="Machete on SM90, else Marlin; without a kernel the server ends",
    ),
)
