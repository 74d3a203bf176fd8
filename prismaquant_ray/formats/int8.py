"""INT8 (W8A8): 8-bit integer weights with one BF16 scale per output channel; dynamic per-token 8-bit activations.

Tensors: `weight` I8 (O, I), `weight_scale` BF16 (O, 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import Format, Scaling, Served, in_float32
from prismaquant_ray.formats.channel import Bf16ScaleCodec
from prismaquant_ray.formats.grids import Grid

#: What the largest activation of a token becomes, and the smallest that it becomes of.
LARGEST, LEAST_TOKEN = 127.0, 2.0**-120


class Int8ChannelCodec(Bf16ScaleCodec):
    """Integers −128…127 under one BF16 scale per row."""

    name = "int8_channel"
    code_bits = 8
    grid_max = 127.5
    grid = Grid(-128.0, 127.0, 128.0, 2.0**-7)
    kept = torch.int8
    codes = "weight"
    # A row of thousands of columns is no group that a kernel reads at once, and has little to gain by clipping.
    searched = False
    # Other writers store them as the runtime holds them.
    scales_read = ("F32",)

    def width(self, in_features: int) -> int:
        """The whole row."""
        return in_features

    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Tensor:  # noqa: ARG002
        """The nearest scale alone."""
        return self.nearest_scale(amax, global_scale).unsqueeze(0)

    def round(self, x: Tensor) -> Tensor:
        """Nearest integer in −128…127, ties to even: the grid's values, by fewer operations."""
        return x.round().clamp_(-128, 127)

    def packed(self, values: Tensor) -> Tensor:
        """Integers are their own codes."""
        return in_float32(values).to(torch.int8)

    def unpacked(self, codes: Tensor) -> Tensor:
        """Integers in float32."""
        return codes.to(torch.float32)


def _round_activation(x: Tensor, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001 - scales are dynamic
    """Round x (T, I) as vLLM's kernel does: x · (127 / amax) to the nearest integer, times amax / 127.

    compressed-tensors' scale is amax / 127.5, with which the largest of a token loses half a step.
    """
    amax = x.abs().amax(-1, keepdim=True)
    # Below, the quotient would be infinite, and times zero no number.
    factor = torch.full_like(amax, LARGEST) / amax.clamp(min=LEAST_TOKEN)
    return (x * factor).round_().clamp_(-LARGEST, LARGEST).mul_(amax / torch.full_like(amax, LARGEST))


def _scheme(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001 - one scheme for all shapes
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    return {**common, "strategy": "channel", "dynamic": False}, {**common, "strategy": "token", "dynamic": True}


FORMAT = Format(
    name=FormatName.INT8,
    codec=Int8ChannelCodec(),
    round_activation=_round_activation,
    activation_scaling=Scaling.INTEGER,
    compression="int-quantized",
    scheme=_scheme,
    summary="8-bit integer weights per channel, dynamic 8-bit activations per token",
    letter="J",
    colours=("#f7d794", "#332200"),
    served=Served(
        vllm_scheme="W8A8Int8",
        loads_from=75,
        full_from=75,
        loads_to=90,
        shape_rule="none",
        conditions="CUTLASS up to SM90; from SM100 on vLLM chooses it, too, and ends at the first product",
    ),
)
