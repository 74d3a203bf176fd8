"""MXFP8: E4M3 weights and activations, a power-of-two scale per 32 columns.

Tensors: `weight` F8_E4M3 (O, I), `weight_scale` U8 (O, I/32), the biased exponent.
"""

from __future__ import annotations

from prismaquant_ray.formats import FormatName, mx
from prismaquant_ray.formats.base import Format, Scaling, Served
from prismaquant_ray.formats.e4m3 import E4m3Codec
from prismaquant_ray.formats.grids import E4M3_MAX, round_e4m3


class MxFp8Codec(E4m3Codec, mx.MxCodec):
    """E4M3 under E8M0 scales. A smaller scale would clip and a larger one would only lose bits."""

    name = "mxfp8"


FORMAT = Format(
    name=FormatName.MXFP8,
    codec=MxFp8Codec(),
    round_activation=mx.round_activation(E4M3_MAX, round_e4m3),
    activation_scaling=Scaling.POWER_OF_TWO,
    compression="mxfp8-quantized",
    scheme=mx.scheme(8),
    modelopt=mx.modelopt((4, 3)),
    summary="8-bit float weights and activations, power-of-two scales per 32",
    letter="M",
    colours=("#e8853d", "#2b1000"),
    served=Served(
        vllm_scheme="W8A8Mxfp8",
        loads_from=75,
        full_from=100,
        shape_rule="in % 32",
        conditions="FlashInfer from SM100; below it Marlin, which silently keeps activations in 16 bits",
    ),
    in_transformers=False,
)
