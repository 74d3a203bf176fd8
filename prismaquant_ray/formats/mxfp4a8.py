"""MXFP4A8 (W4A8): MXFP4 weights, dynamic E4M3 activations per token and 128 columns."""

from __future__ import annotations

from typing import Any

from prismaquant_ray.formats import FormatName, mx
from prismaquant_ray.formats.base import VLLM, Format, Scaling, Served
from prismaquant_ray.formats.fp8_block import CODEC as FP8_BLOCK
from prismaquant_ray.formats.fp8_block import SIZE, activation_args, round_of_groups
from prismaquant_ray.formats.mxfp4 import CODEC


def _scheme(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return mx.scheme(4)(in_features)[0], activation_args()


FORMAT = Format(
    name=FormatName.MXFP4A8,
    codec=CODEC,
    round_activation=round_of_groups,
    activation_codec=FP8_BLOCK,
    activation_scaling=Scaling.GROUP,
    compression="mxfp4-pack-quantized",
    scheme=_scheme,
    summary="4-bit float weights, power-of-two scales per 32; dynamic 8-bit float activations per 128",
    letter="W",
    colours=("#5fbfa3", "#04291f"),
    multiples=(SIZE, 1),
    served=Served(
        vllm_scheme="W4A8Mxfp4",
        loads_from=80,
        full_from=80,
        shape_rule="in % 128",
        conditions=(
            "Humming alone, which the wheel for CUDA needs; where it is missing a server rounds activations to 4 bits "
            "(SM100) or not at all (Marlin), with one warning in its log"
        ),
    ),
    experts_refused=f"vLLM {VLLM} has kernels for experts of which not all round activations to 8 bits",
)
