"""FP8: E4M3 weights with one BF16 scale per output channel; dynamic per-token E4M3 activations.

Tensors: `weight` F8_E4M3 (O, I), `weight_scale` BF16 (O, 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import Format, Scaling, Served
from prismaquant_ray.formats.channel import Bf16ScaleCodec
from prismaquant_ray.formats.e4m3 import E4m3Codec
from prismaquant_ray.formats.grids import E4M3_MAX, divided_by, round_e4m3


class Fp8Codec(E4m3Codec, Bf16ScaleCodec):
    """E4M3 under one BF16 scale per row; vLLM refuses a 1-D scale."""

    name = "fp8"
    # Other writers store them as the runtime holds them.
    scales_read = ("F32",)

    def width(self, in_features: int) -> int:
        """The whole row."""
        return in_features


def _round_activation(x: Tensor, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001 - scales are dynamic
    scale = divided_by(x.abs().amax(-1, keepdim=True), E4M3_MAX)
    scale = torch.where(scale == 0, 1.0, scale)
    return round_e4m3(x / scale).mul_(scale)


def _scheme(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001 - one scheme for all shapes
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {**common, "strategy": "channel", "dynamic": False}, {**common, "strategy": "token", "dynamic": True}


def _modelopt(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001 - one for all shapes
    """ModelOpt 0.47's `fp8_per_channel_per_token`."""
    return {"num_bits": [4, 3], "axis": 0}, {"num_bits": [4, 3], "type": "dynamic", "block_sizes": {-1: None}}


FORMAT = Format(
    name=FormatName.FP8,
    codec=Fp8Codec(),
    round_activation=_round_activation,
    activation_scaling=Scaling.TOKEN,
    compression="float-quantized",
    scheme=_scheme,
    modelopt=_modelopt,
    summary="8-bit float weights per channel, dynamic 8-bit activations per token",
    letter="F",
    colours=("#f6c65b", "#332200"),
    served=Served(
        vllm_scheme="W8A8Fp8",
        loads_from=75,
        full_from=89,
        shape_rule="none",
        conditions="CUTLASS or FlashInfer from SM89; below it Marlin, which silently keeps activations in 16 bits",
    ),
)
