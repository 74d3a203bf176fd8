"""NVFP4A16: NVFP4 weights, activations untouched. Costs the bytes of NVFP4; choose it for accuracy over speed."""

from __future__ import annotations

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import VLLM, Format, Served
from prismaquant_ray.formats.nvfp4 import CODEC, modelopt_a16, scheme_a16

FORMAT = Format(
    name=FormatName.NVFP4A16,
    codec=CODEC,
    compression="nvfp4-pack-quantized",
    scheme=scheme_a16,
    modelopt=modelopt_a16,
    summary="4-bit float weights, scales per 16; 16-bit activations",
    letter="A",
    colours=("#5f9fd6", "#00182b"),
    served=Served(
        vllm_scheme="W4A4Fp4(use_a16)",
        loads_from=75,
        full_from=75,
        shape_rule="in % 16",
        conditions="Marlin; without it the server ends",
    ),
    experts_refused=(f"vLLM {VLLM} waits for an input scale of every expert, which a weight-only format does not have"),
)
