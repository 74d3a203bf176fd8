"""Group scales by search: each candidate is judged as it would be stored, errors weighted by E[x²]."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.formats import codec_named
from prismaquant_ray.formats.base import Codec, Rounded, grouped
from prismaquant_ray.kernels import operator

# Rows are taken in pieces that stay in a core's cache while all candidates are tried.
_PIECE = 1 << 17


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSearch:
    """`grid` multipliers evenly spaced over `span` (ends included) times the scale that fits the group's amax."""

    grid: int = 32
    span: tuple[float, float] = (0.5, 1.5)

    def multipliers(self, codec: Codec) -> Tensor:
        """Those that a codec tries, ascending, float64; the largest that it allows is one of them."""
        every = torch.linspace(self.span[0], self.span[1], self.grid, dtype=torch.float64)
        # Of many bits a scale that clips by little loses more than any other.
        tried: Tensor = every.clamp(max=codec.largest_multiplier).unique()
        return tried


@functools.cache
def _multipliers(settings: ScaleSearch, codec: Codec, device: torch.device) -> Tensor:
    """On a device, in float32; copied there once, because a copy makes the host wait."""
    return settings.multipliers(codec).to(device, torch.float32)


def nearest(weight: Tensor, codec: Codec, global_scale: Tensor | None) -> Rounded:
    """Round-to-nearest: amax of every group mapped to the end of the grid. weight (O, I) or (E, O, I) float32."""
    groups = weight.shape[-1] // codec.width(weight.shape[-1])
    scale = codec.nearest_scale(grouped(weight, groups).abs().amax(-1), global_scale)
    return round_with(weight, scale, codec, global_scale)


def searched(
    weight: Tensor, codec: Codec, global_scale: Tensor | None, importance: Tensor, settings: ScaleSearch
) -> Rounded:
    """Rounding with the group scales that minimise Σ_i E[x_i²] (w_i − ŵ_i)² over the candidates.

    weight (O, I) float32, importance (I,); or of a stack (E, O, I) and (E, I). Ties keep the earlier candidate.
    """
    stacked = weight.view(-1, *weight.shape[-2:])
    multipliers = _multipliers(settings, codec, weight.device)
    scale = search_scales(stacked, global_scale, importance.reshape(len(stacked), -1), multipliers, codec.name)
    return round_with(weight, scale.view(*weight.shape[:-1], -1), codec, global_scale)


def round_with(weight: Tensor, scale: Tensor, codec: Codec, global_scale: Tensor | None) -> Rounded:
    """Nearest grid values under given stored scales (…, O, G)."""
    factor = codec.scale_value(scale, global_scale).flatten(0, -2)
    values = round_scaled(weight.flatten(0, -2), factor, codec.name)
    return Rounded(values=values.view_as(weight), scale=scale, global_scale=global_scale)


def _round_scaled(weight: Tensor, factors: Tensor, codec: str) -> Tensor:
    groups = factors.shape[-1]
    values = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows = max(1, _PIECE // weight.shape[-1])
    for piece, part, target in zip(*(matrix.split(rows) for matrix in (weight, factors, values)), strict=True):
        target.copy_(codec_named(codec).round((grouped(piece, groups) / part.unsqueeze(-1)).flatten(-2)))
    return values


#: Grid values (rows, I) nearest to weight (rows, I) divided by the factors of its groups (rows, G).
round_scaled = operator("round_scaled(Tensor weight, Tensor factors, str codec) -> Tensor", _round_scaled)


def _search_scales(
    weight: Tensor, global_scale: Tensor | None, importance: Tensor, multipliers: Tensor, codec: str
) -> Tensor:
    groups = weight.shape[-1] // codec_named(codec).width(weight.shape[-1])
    weight, importance = grouped(weight, groups), grouped(importance.unsqueeze(1), groups)
    experts = max(1, _PIECE // weight[0].numel())
    rows = max(1, _PIECE // weight[0, 0].numel())
    scales = []
    for first in range(0, len(weight), experts):
        some = slice(first, first + experts)
        divisor = None if global_scale is None else global_scale[some]
        pieces = weight[some].split(rows, dim=1)
        found = [_best_scale(part, codec_named(codec), divisor, importance[some], multipliers) for part in pieces]
        scales.append(torch.cat(found, dim=1))
    return torch.cat(scales)


#: Stored scales (E, O, G) that minimise the error of weight (E, O, I) weighted by importance (E, I).
search_scales = operator(
    "search_scales(Tensor weight, Tensor? global_scale, Tensor importance, Tensor multipliers, str codec) -> Tensor",
    _search_scales,
)


def _best_scale(
    weight: Tensor, codec: Codec, global_scale: Tensor | None, importance: Tensor, multipliers: Tensor
) -> Tensor:
    """Stored scales (E, rows, G) for weight (E, rows, G, width) and importance (E, 1, G, width)."""
    best_error: Tensor | None = None
    best_scale: Tensor | None = None
    candidates = codec.scale_candidates(weight.abs().amax(-1), global_scale, multipliers)
    for scale in _distinct(candidates):
        factor = codec.scale_value(scale, global_scale).unsqueeze(-1)
        error = codec.snap(weight / factor).mul_(factor).sub_(weight).square_().mul_(importance).sum(-1)
        if best_error is None or best_scale is None:
            best_error, best_scale = error, scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    assert best_scale is not None
    return best_scale


def _distinct(scales: Tensor) -> Tensor:
    """Candidates (K, …) without repetitions: the k-th holds every group's k-th scale, or again its last.

    Stored scales are coarse: of 32 multipliers of an E4M3 scale a group has about 14 distinct ones.
    """
    if len(scales) == 1:
        return scales
    codes = scales.view(torch.uint8) if scales.itemsize == 1 else scales
    place = torch.zeros(codes.shape, dtype=torch.int64, device=codes.device)
    # A running sum in steps: cumsum along the first dimension takes ten times as long.
    for before, here, new in zip(place[:-1], place[1:], codes[1:] != codes[:-1], strict=True):
        torch.add(before, new, out=here)
    count = int(place[-1].max()) + 1
    if count == len(scales):
        return scales
    distinct = codes[-1].expand(count, *codes.shape[1:]).clone()
    return distinct.scatter_(0, place, codes).view(scales.dtype)
