"""Shared by FP8 and the integers: BF16 scales per group of a row, searched by clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec
from prismaquant_ray.formats.grids import divided_by


class Bf16ScaleCodec(Codec):
    """A grid under BF16 scales. BF16 because transformers casts scales to the model's dtype on load."""

    scale_bits = 16
    # A larger scale than amax needs never helps a uniform grid much.
    largest_multiplier = 1.0

    def nearest_scale(self, amax: Tensor, global_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        """BF16(amax / grid_max); groups of zeros get 1."""
        scale = divided_by(amax, self.grid_max).to(torch.bfloat16)
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def scale_value(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        """The stored scale in float32."""
        return scale.to(torch.float32)

    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Tensor:
        """BF16 of each multiple."""
        return self.nearest_scale(amax * multipliers.view(-1, *[1] * amax.dim()), global_scale)
