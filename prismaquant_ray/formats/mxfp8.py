"""MXFP8: E4M3 weights and activations, a power-of-two scale per 32 columns.

Tensors: `weight` F8_E4M3 (O, I), `weight_scale` U8 (O, I/32), the biased exponent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import mx
from prismaquant_ray.formats.base import Format, FormatName, Rounded, Tensors
from prismaquant_ray.formats.grids import E4M3_MAX, round_e4m3


class MxFp8Codec(mx.MxCodec):
    """E4M3 under E8M0 scales. A smaller scale would clip and a larger one would only lose bits: nothing to search."""

    name = "mxfp8"
    code_bits = 8
    grid_max = E4M3_MAX

    def round(self, x: Tensor) -> Tensor:
        """E4M3."""
        return round_e4m3(x)

    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Iterator[Tensor]:  # noqa: ARG002
        """The smallest scale without clipping."""
        return iter((self.nearest_scale(amax, None),))

    def pack(self, rounded: Rounded) -> Tensors:
        """E4M3 codes and biased exponents."""
        return {"weight": rounded.values.to(torch.float8_e4m3fn), "weight_scale": rounded.scale.contiguous()}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """E4M3 × 2^(e − 127)."""
        values = tensors["weight"].to(torch.float32)
        return self.dequantized(Rounded(values=values, scale=tensors["weight_scale"], global_scale=None))


def _scheme(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001 - one scheme for all shapes
    return mx.args(8, dynamic=False), mx.args(8, dynamic=True)


FORMAT = Format(
    name=FormatName.MXFP8,
    codec=MxFp8Codec(),
    round_activation=mx.round_activation(E4M3_MAX, round_e4m3),
    static_input_scale=False,
    compression="mxfp8-quantized",
    scheme=_scheme,
    summary="8-bit float weights and activations, power-of-two scales per 32",
)
