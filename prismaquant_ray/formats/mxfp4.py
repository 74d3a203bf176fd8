"""MXFP4: E2M1 weights and activations, a power-of-two scale per 32 columns.

Tensors: `weight_packed` U8 (O, I/2), `weight_scale` U8 (O, I/32), the biased exponent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName, mx
from prismaquant_ray.formats.base import Format, Scaling, Served
from prismaquant_ray.formats.e2m1 import E2m1Codec
from prismaquant_ray.formats.grids import E2M1_MAX, round_e2m1


class MxFp4Codec(E2m1Codec, mx.MxCodec):
    """E2M1 under E8M0 scales."""

    name = "mxfp4"

    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Tensor:  # noqa: ARG002
        """The smallest scale without clipping, and the next two smaller ones: 4 bits often gain by clipping."""
        largest = self.nearest_scale(amax, None).to(torch.int16)
        steps = torch.arange(3, dtype=torch.int16, device=amax.device).view(-1, *[1] * amax.dim())
        return (largest - steps).clamp_(min=1).to(torch.uint8)


CODEC = MxFp4Codec()
FORMAT = Format(
    name=FormatName.MXFP4,
    codec=CODEC,
    round_activation=mx.round_activation(E2M1_MAX, round_e2m1),
    activation_scaling=Scaling.POWER_OF_TWO,
    compression="mxfp4-pack-quantized",
    scheme=mx.scheme(4),
    modelopt=mx.modelopt((2, 1)),
    summary="4-bit float weights and activations, power-of-two scales per 32",
    letter="X",
    colours=("#8fd6c0", "#04291f"),
    served=Served(
        vllm_scheme="W4A4Mxfp4",
        loads_from=80,
        full_from=100,
        shape_rule="in % 32",
        conditions=(
            "FlashInfer from SM100; below it Marlin, which keeps activations in 16 bits, with one warning in the log"
        ),
    ),
)
