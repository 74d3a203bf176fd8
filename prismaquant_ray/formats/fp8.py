"""FP8: E4M3 weights with one BF16 scale per output channel; dynamic per-token E4M3 activations.

Tensors: `weight` F8_E4M3 (O, I), `weight_scale` BF16 (O, 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Format, FormatName, Rounded, Tensors
from prismaquant_ray.formats.channel import Bf16ScaleCodec
from prismaquant_ray.formats.grids import E4M3_MAX, round_e4m3


class Fp8Codec(Bf16ScaleCodec):
    """E4M3 under one scale per row."""

    name = "fp8"
    code_bits = 8
    grid_max = E4M3_MAX

    def width(self, in_features: int) -> int:
        """The whole row."""
        return in_features

    def refusal(self, out_features: int, in_features: int) -> str | None:  # noqa: ARG002
        """Every shape can be stored."""
        return None

    def round(self, x: Tensor) -> Tensor:
        """E4M3."""
        return round_e4m3(x)

    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Iterator[Tensor]:  # noqa: ARG002
        """No search: a float grid is as fine near its end as anywhere, so clipping only loses."""
        return iter((self.nearest_scale(amax, None),))

    def pack(self, rounded: Rounded) -> Tensors:
        """E4M3 codes and BF16 scales (O, 1); vLLM refuses a 1-D scale."""
        return {"weight": rounded.values.to(torch.float8_e4m3fn), "weight_scale": rounded.scale.contiguous()}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """E4M3 × scale in float32, then BF16."""
        values = tensors["weight"].to(torch.float32)
        return self.dequantized(Rounded(values=values, scale=tensors["weight_scale"], global_scale=None))


def _round_activation(x: Tensor, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001 - scales are dynamic
    scale = x.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return round_e4m3(x / scale).mul_(scale)


def _scheme(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001 - one scheme for all shapes
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {**common, "strategy": "channel", "dynamic": False}, {**common, "strategy": "token", "dynamic": True}


FORMAT = Format(
    name=FormatName.FP8,
    codec=Fp8Codec(),
    round_activation=_round_activation,
    static_input_scale=False,
    compression="float-quantized",
    scheme=_scheme,
    summary="8-bit float weights per channel, dynamic 8-bit activations per token",
)
