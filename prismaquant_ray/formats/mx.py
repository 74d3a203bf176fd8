"""Shared by MXFP4 and MXFP8: groups of 32 columns under an E8M0 (power of two) scale, stored as U8.

Source: OCP Microscaling Formats (MX) Specification v1.0, section 5. The E8M0 dtype of torch is never stored:
vLLM and compressed-tensors read it by value and get other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec, grouped
from prismaquant_ray.formats.grids import divided_by, e8m0_at_least, e8m0_value

WIDTH = 32


class MxCodec(Codec):
    """A grid under E8M0 scales."""

    scale_bits = 8
    multiple = WIDTH

    def width(self, in_features: int) -> int:  # noqa: ARG002 - the same for every shape
        """32 columns."""
        return WIDTH

    def nearest_scale(self, amax: Tensor, global_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        """Smallest power of two at which amax does not saturate."""
        return e8m0_at_least(divided_by(amax, self.grid_max))

    def scale_value(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        """2^(e − 127)."""
        return e8m0_value(scale)


def round_activation(
    grid_max: float, round_to_grid: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Activation rounding with dynamic E8M0 scales per 32 values, chosen as compressed-tensors chooses them.

    The scale is 2^(floor(log2 amax') − ⌊log2 grid_max⌋), where amax' is amax rounded up to the next power of two
    when its mantissa is at least 1.75.
    """

    def rounding(x: Tensor, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001 - scales are dynamic
        values = grouped(x, x.shape[-1] // WIDTH)
        amax = values.abs().amax(-1, keepdim=True)
        scale = e8m0_value(runtime_exponent(amax, grid_max))
        return round_to_grid(values / scale).mul_(scale).flatten(-2)

    return rounding


def runtime_exponent(amax: Tensor, grid_max: float) -> Tensor:
    """Biased exponent (uint8) the runtime picks for activations with this amax."""
    # Adding a quarter of the mantissa range carries into the exponent exactly when the mantissa is ≥ 1.75.
    bits = amax.to(torch.float32).view(torch.int32) + (1 << 21)
    exponent = (bits >> 23) - int(math.log2(grid_max))
    return exponent.clamp_(1, 254).to(torch.uint8)


def scheme(num_bits: int) -> Callable[[int], tuple[dict[str, Any], dict[str, Any]]]:
    """`Format.scheme` of MXFP4 or MXFP8, the same for every in_features; vLLM recognises MXFP8 by `scale_dtype`."""
    weights = {
        "num_bits": num_bits,
        "type": "float",
        "strategy": "group",
        "group_size": WIDTH,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    return lambda _: ({**weights}, {**weights, "dynamic": True})


def modelopt(elements: tuple[int, int]) -> Callable[[int], tuple[dict[str, Any], dict[str, Any]]]:
    """`Format.modelopt` of MXFP4 or MXFP8, as in ModelOpt 0.47; `elements` are exponent and mantissa bits."""

    def attributes() -> dict[str, Any]:
        blocks = {-1: WIDTH, "type": "dynamic", "scale_bits": [8, 0]}
        return {"num_bits": [*elements], "block_sizes": blocks}

    return lambda _: (attributes(), attributes())
