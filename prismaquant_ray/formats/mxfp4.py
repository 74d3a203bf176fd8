"""MXFP4: E2M1 weights and activations, a power-of-two scale per 32 columns.

Tensors: `weight_packed` U8 (O, I/2), `weight_scale` U8 (O, I/32), the biased exponent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName, mx
from prismaquant_ray.formats.base import Format, Served
from prismaquant_ray.formats.grids import E2M1_MAX, pack_e2m1, round_e2m1, snap_e2m1, unpack_e2m1


class MxFp4Codec(mx.MxCodec):
    """E2M1 under E8M0 scales."""

    name = "mxfp4"
    code_bits = 4
    grid_max = E2M1_MAX

    def round(self, x: Tensor) -> Tensor:
        """E2M1."""
        return round_e2m1(x)

    def snap(self, x: Tensor) -> Tensor:
        """E2M1 but for the sign of zero."""
        return snap_e2m1(x)

    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Iterator[Tensor]:  # noqa: ARG002
        """The smallest scale without clipping, and the next two smaller ones: 4 bits often gain by clipping."""
        largest = self.nearest_scale(amax, None)
        return ((largest.to(torch.int16) - step).clamp_(min=1).to(torch.uint8) for step in range(3))

    def packed(self, values: Tensor) -> Tensor:
        """Two codes a byte."""
        return pack_e2m1(values)

    def unpacked(self, codes: Tensor) -> Tensor:
        """E2M1."""
        return unpack_e2m1(codes)


def _scheme(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001 - one scheme for all shapes
    return mx.args(4, dynamic=False), mx.args(4, dynamic=True)


FORMAT = Format(
    name=FormatName.MXFP4,
    codec=MxFp4Codec(),
    round_activation=mx.round_activation(E2M1_MAX, round_e2m1),
    static_input_scale=False,
    compression="mxfp4-pack-quantized",
    scheme=_scheme,
    summary="4-bit float weights and activations, power-of-two scales per 32",
    letter="X",
    colours=("#8fd6c0", "#04291f"),
    served=Served(vllm_scheme="W4A4Mxfp4", loads_from=80, full_from=100, shape_rule="in % 32"),
)
