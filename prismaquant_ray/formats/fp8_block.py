"""FP8_BLOCK: E4M3 weights with one scale per 128 × 128, dynamic E4M3 activations per token and 128 columns.

Tensors: `weight` F8_E4M3 (O, I), `weight_scale` F32 (⌈O/128⌉, I/128). Weights that the source has in this form ship as
they are (`source.passed`). Of others the scale is a power of two: where DeepGEMM runs, vLLM rounds the scales up to
powers of two when it loads them, and the codes again, which changes nothing then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import VLLM, Format, Scaling, Served, grouped
from prismaquant_ray.formats.e4m3 import E4m3Codec
from prismaquant_ray.formats.grids import E4M3_MAX, divided_by, e8m0_at_least, e8m0_value, round_e4m3

#: Rows and columns of a block.
SIZE = 128
_BLOCK = [SIZE, SIZE]


class Fp8BlockCodec(E4m3Codec):
    """E4M3 under float32 scales of blocks; a matrix may end within a block of rows."""

    name = "fp8_block"
    scale_bits = 32
    rows = SIZE
    multiple = SIZE
    # Other writers store them in the model's type.
    scales_read = ("BF16",)

    def width(self, in_features: int) -> int:  # noqa: ARG002 - the same for every shape
        """128 columns."""
        return SIZE

    def nearest_scale(self, amax: Tensor, global_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        """Smallest power of two at which the largest weight of the block does not saturate, for each of its rows."""
        rows = amax.shape[-2]
        blocks = torch.nn.functional.pad(amax, (0, 0, 0, -rows % SIZE)).unflatten(-2, (-1, SIZE)).amax(-2)
        return self.of_rows(e8m0_value(e8m0_at_least(divided_by(blocks, self.grid_max))), rows)

    def scale_value(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        """The stored scale in float32."""
        return scale.to(torch.float32)


def round_of_groups(x: Tensor, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001 - scales are dynamic
    """Round x (T, I) under scales amax / 448 of 128 columns."""
    values = grouped(x, x.shape[-1] // SIZE)
    scale = divided_by(values.abs().amax(-1, keepdim=True), E4M3_MAX)
    scale = torch.where(scale == 0, 1.0, scale)
    return round_e4m3(values / scale).mul_(scale).flatten(-2)


def activation_args() -> dict[str, Any]:
    """Dynamic E4M3 in groups of 128."""
    return {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": SIZE,
        "symmetric": True,
        "dynamic": True,
    }


def _scheme(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001 - one scheme for all shapes
    weights = {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": _BLOCK,
        "symmetric": True,
        "dynamic": False,
    }
    return weights, activation_args()


CODEC = Fp8BlockCodec()
FORMAT = Format(
    name=FormatName.FP8_BLOCK,
    codec=CODEC,
    round_activation=round_of_groups,
    activation_scaling=Scaling.GROUP,
    compression="float-quantized",
    scheme=_scheme,
    summary="8-bit float weights per 128 × 128, as in an FP8 source; dynamic 8-bit activations per 128",
    letter="K",
    colours=("#d9a441", "#2b1d00"),
    served=Served(
        vllm_scheme="W8A8Fp8",
        loads_from=75,
        full_from=90,
        shape_rule="in % 128; of fused matrices out % 128",
        conditions=(
            "DeepGEMM or CUTLASS from SM90; below it Marlin, which silently keeps activations in 16 bits. DeepGEMM "
            "scales activations by powers of two, and rounds the scales and codes of an FP8 source to such on loading "
            "(VLLM_USE_DEEP_GEMM_E8M0=0 keeps both). Each rank of tensor parallelism needs whole blocks"
        ),
    ),
    head_refused=f"vLLM {VLLM} cannot load an output head with scales of blocks",
)
