"""Shared by FP8, FP8_BLOCK and MXFP8: E4M3 codes, under scales that only have to avoid clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec
from prismaquant_ray.formats.grids import E4M3, E4M3_MAX, e4m3_value


class E4m3Codec(Codec):
    """`weight` F8_E4M3 (O, I) and `weight_scale`; the scale type comes from the codec's other base class."""

    code_bits = 8
    grid_max = E4M3_MAX
    grid = E4M3
    codes = "weight"
    # A float grid is as fine near its end as anywhere, so clipping only loses.
    searched = False

    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Tensor:  # noqa: ARG002
        """The nearest scale alone."""
        return self.nearest_scale(amax, global_scale).unsqueeze(0)

    def packed(self, values: Tensor) -> Tensor:
        """E4M3 is its own code."""
        return values.to(torch.float8_e4m3fn)

    def unpacked(self, codes: Tensor) -> Tensor:
        """E4M3 in float32."""
        return e4m3_value(codes)
