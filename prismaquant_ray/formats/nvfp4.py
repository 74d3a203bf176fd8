"""NVFP4: E2M1 codes, an E4M3 scale per 16 columns, one float32 divisor per fused group; 4-bit activations.

Tensors: `weight_packed` U8 (O, I/2), `weight_scale` F8_E4M3 (O, I/16), `weight_global_scale` F32 (1,) and, with
activation rounding, `input_global_scale` F32 (1,). Both global scales are divisors: vLLM inverts them on load.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import Format, Scaling, Served, grouped
from prismaquant_ray.formats.e2m1 import E2m1Codec
from prismaquant_ray.formats.grids import E2M1_MAX, E4M3_MAX, divided_by, round_e2m1

WIDTH = 16
#: a searched group scale may exceed the one that maps amax to 6 by this factor and must still fit in E4M3
HEADROOM = 1.5
# the divisor of an input allows for activations this many times as large as in calibration: a divisor too small costs
# almost nothing over four octaves, one too large clips
_INPUT_HEADROOM = 2.0
#: smallest scale used in place of an underflow to zero, as compressed-tensors does
ZERO_SCALE = 0.125


def divisor(amax: float | Tensor, headroom: float) -> Tensor:
    """448·6 / (headroom · amax), the largest BF16-representable value not above it.

    Float32, (1,) for a number and amax's shape for a tensor of them. With a BF16 value, `s/g` (compressed-tensors) and
    `s·(1/g)` (vLLM) decode to the same BF16 weight. Where amax is 0, so is every weight, and the divisor is 1.
    """
    largest = torch.atleast_1d(torch.as_tensor(amax, dtype=torch.float64))
    exact = (E4M3_MAX * E2M1_MAX / (headroom * largest)).to(torch.float32)
    exact = exact.clamp_(max=torch.finfo(torch.bfloat16).max)
    # Truncating a float32 to its upper half rounds toward zero, so head-room is never lost to rounding.
    return torch.where(largest == 0, 1.0, (exact.view(torch.int32) & -65536).view(torch.float32))


def input_divisor(amax: float | Tensor) -> Tensor:
    """The divisor of an input whose largest |x| in calibration is amax; shaped as by `divisor`."""
    return divisor(amax, _INPUT_HEADROOM)


@functools.cache
def _least(device: torch.device) -> Tensor:
    """`ZERO_SCALE` as stored."""
    return torch.full((), ZERO_SCALE, device=device).to(torch.float8_e4m3fn)


class NvFp4Codec(E2m1Codec):
    """Two-level scaled E2M1."""

    name = "nvfp4"
    scale_bits = 8
    # vLLM has no padding: a padded scale loads, and the last group is dropped.
    multiple = WIDTH

    def width(self, in_features: int) -> int:  # noqa: ARG002 - the same for every shape
        """16 columns."""
        return WIDTH

    def global_scale(self, amax: float | Tensor) -> Tensor:
        """Shared by every member of a fused group, because vLLM applies the largest to all of them."""
        return divisor(amax, HEADROOM)

    def _stored(self, scale: Tensor) -> Tensor:
        stored = scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        return torch.where(stored.view(torch.uint8) == 0, _least(scale.device), stored)

    def nearest_scale(self, amax: Tensor, global_scale: Tensor | None) -> Tensor:
        """E4M3(amax / 6 · g), in compressed-tensors' order: another one rounds a few float32 ties differently."""
        assert global_scale is not None
        return self._stored(divided_by(amax, E2M1_MAX) * global_scale)

    def scale_value(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:
        """s / g in float32."""
        assert global_scale is not None
        return scale.to(torch.float32) / global_scale

    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Tensor:
        """E4M3 of each multiple of amax / 6 · g."""
        assert global_scale is not None
        base = divided_by(amax, E2M1_MAX) * global_scale
        return self._stored(base * multipliers.view(-1, *[1] * base.dim()))


def _round_activation(x: Tensor, input_scale: Tensor | None) -> Tensor:
    """Round x (T, I) as the W4A4 kernel does: E4M3 scale per 16 values below a static divisor, E2M1 codes."""
    assert input_scale is not None
    values = grouped(x, x.shape[-1] // WIDTH)
    amax = values.abs().amax(-1, keepdim=True)
    scale = (divided_by(amax, E2M1_MAX) * input_scale).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
    scale = torch.where(scale == 0, ZERO_SCALE, scale) / input_scale
    return round_e2m1(values / scale).mul_(scale).flatten(-2)


def _args(*, dynamic: bool | str) -> dict[str, Any]:
    return {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": WIDTH,
        "symmetric": True,
        "dynamic": dynamic,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    }


def scheme_a16(in_features: int) -> tuple[dict[str, Any], None]:  # noqa: ARG001 - one scheme for all shapes
    """Weights only."""
    return _args(dynamic=False), None


def _scheme(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001
    """Weights, and activations with a static divisor and dynamic group scales."""
    return _args(dynamic=False), _args(dynamic="local")


def _attributes() -> dict[str, Any]:
    """ModelOpt 0.47's `nvfp4`."""
    blocks = {-1: WIDTH, "type": "dynamic", "scale_bits": [4, 3]}
    return {"num_bits": [2, 1], "block_sizes": blocks}


def modelopt_a16(in_features: int) -> tuple[dict[str, Any], None]:  # noqa: ARG001 - one for all shapes
    """Weights only."""
    return _attributes(), None


def _modelopt(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001
    return _attributes(), _attributes()


CODEC = NvFp4Codec()
FORMAT = Format(
    name=FormatName.NVFP4,
    codec=CODEC,
    round_activation=_round_activation,
    activation_scaling=Scaling.STATIC,
    static_input_scale=True,
    compression="nvfp4-pack-quantized",
    scheme=_scheme,
    modelopt=_modelopt,
    summary="4-bit float weights and activations, scales per 16",
    letter="N",
    colours=("#9ccbee", "#06263f"),
    served=Served(
        vllm_scheme="W4A4Fp4",
        loads_from=75,
        full_from=100,
        shape_rule="in % 16",
        conditions="FlashInfer or CUTLASS from SM100; below it Marlin, which silently keeps activations in 16 bits",
    ),
    in_transformers=False,
)
