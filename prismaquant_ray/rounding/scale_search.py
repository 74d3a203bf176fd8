"""Group scales by search: each candidate is judged as it would be stored, errors weighted by E[x²]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec, Rounded, grouped

# Rows are taken in pieces that stay in a core's cache while all candidates are tried.
_PIECE = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSearch:
    """`grid` multipliers evenly spaced over `span` (ends included) times the scale that fits the group's amax."""

    grid: int = 32
    span: tuple[float, float] = (0.5, 1.5)

    def multipliers(self) -> Tensor:
        """The multipliers, ascending."""
        return torch.linspace(self.span[0], self.span[1], self.grid, dtype=torch.float64)


def nearest(weight: Tensor, codec: Codec, global_scale: Tensor | None) -> Rounded:
    """Round-to-nearest: amax of every group mapped to the end of the grid."""
    groups = weight.shape[1] // codec.width(weight.shape[1])
    scale = codec.nearest_scale(grouped(weight, groups).abs().amax(-1), global_scale)
    return round_with(weight, scale, codec, global_scale)


def searched(
    weight: Tensor, codec: Codec, global_scale: Tensor | None, importance: Tensor, settings: ScaleSearch
) -> Rounded:
    """Rounding with the group scales that minimise Σ_i E[x_i²] (w_i − ŵ_i)² over the candidates.

    weight (O, I) float32, importance (I,). Ties keep the earlier candidate.
    """
    groups = weight.shape[1] // codec.width(weight.shape[1])
    rows = max(1, _PIECE // weight.shape[1])
    pieces = [
        _best_scale(grouped(piece, groups), codec, global_scale, grouped(importance, groups), settings.multipliers())
        for piece in weight.split(rows)
    ]
    return round_with(weight, torch.cat(pieces), codec, global_scale)


def round_with(weight: Tensor, scale: Tensor, codec: Codec, global_scale: Tensor | None) -> Rounded:
    """Nearest grid values under given stored scales (O, G)."""
    factor = codec.scale_value(scale, global_scale)
    values = codec.round((grouped(weight, scale.shape[1]) / factor.unsqueeze(-1)).flatten(1))
    return Rounded(values=values, scale=scale, global_scale=global_scale)


def _best_scale(
    weight: Tensor, codec: Codec, global_scale: Tensor | None, importance: Tensor, multipliers: Tensor
) -> Tensor:
    """Stored scales (rows, G) for weight (rows, G, width)."""
    best_error: Tensor | None = None
    best_scale: Tensor | None = None
    for scale in codec.scale_candidates(weight.abs().amax(-1), global_scale, multipliers):
        factor = codec.scale_value(scale, global_scale).unsqueeze(-1)
        error = codec.round(weight / factor).mul_(factor).sub_(weight).square_().mul_(importance).sum(-1)
        if best_error is None or best_scale is None:
            best_error, best_scale = error, scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    assert best_scale is not None
    return best_scale
