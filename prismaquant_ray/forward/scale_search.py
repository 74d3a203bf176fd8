"""Group scales by search: each candidate is judged as it would be stored, errors weighted by E[x²]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec, Rounded, at_once, grouped

# Rows are taken in pieces that stay in a core's cache while all candidates are tried.
_PIECE = 1 << 17


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSearch:
    """`grid` multipliers evenly spaced over `span` (ends included) times the scale that fits the group's amax."""

    grid: int = 32
    span: tuple[float, float] = (0.5, 1.5)

    def multipliers(self) -> Tensor:
        """The multipliers, ascending."""
        return torch.linspace(self.span[0], self.span[1], self.grid, dtype=torch.float64)


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
    groups = weight.shape[-1] // codec.width(weight.shape[-1])
    stacked = grouped(weight.view(-1, *weight.shape[-2:]), groups)
    importance = grouped(importance.reshape(len(stacked), 1, -1), groups)
    piece = at_once(weight.device, _PIECE)
    experts = max(1, piece // weight.shape[-2:].numel())
    rows = max(1, piece // weight.shape[-1])
    multipliers = settings.multipliers().to(weight.device)
    scales = []
    for first in range(0, len(stacked), experts):
        some = slice(first, first + experts)
        divisor = None if global_scale is None else global_scale[some]
        pieces = stacked[some].split(rows, dim=1)
        found = [_best_scale(part, codec, divisor, importance[some], multipliers) for part in pieces]
        scales.append(torch.cat(found, dim=1))
    return round_with(weight, torch.cat(scales).view(*weight.shape[:-1], groups), codec, global_scale)


def round_with(weight: Tensor, scale: Tensor, codec: Codec, global_scale: Tensor | None) -> Rounded:
    """Nearest grid values under given stored scales (…, O, G)."""
    groups = scale.shape[-1]
    factor = codec.scale_value(scale, global_scale).flatten(0, -2)
    values = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows = max(1, at_once(weight.device, _PIECE) // weight.shape[-1])
    pieces = (matrix.split(rows) for matrix in (weight.flatten(0, -2), factor, values.flatten(0, -2)))
    for piece, part, target in zip(*pieces, strict=True):
        target.copy_(codec.round((grouped(piece, groups) / part.unsqueeze(-1)).flatten(-2)))
    return Rounded(values=values, scale=scale, global_scale=global_scale)


def _best_scale(
    weight: Tensor, codec: Codec, global_scale: Tensor | None, importance: Tensor, multipliers: Tensor
) -> Tensor:
    """Stored scales (E, rows, G) for weight (E, rows, G, width) and importance (E, 1, G, width)."""
    best_error: Tensor | None = None
    best_scale: Tensor | None = None
    candidates = list(codec.scale_candidates(weight.abs().amax(-1), global_scale, multipliers))
    # A GPU tries repetitions, too: to leave them out, the host would have to wait for their number.
    for scale in _distinct(candidates) if weight.device.type == "cpu" else candidates:
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


def _distinct(candidates: list[Tensor]) -> list[Tensor]:
    """The candidates without repetitions: the k-th tensor holds every group's k-th scale, or again its last.

    Stored scales are coarse: of 32 multipliers of an E4M3 scale a group has about 14 distinct ones.
    """
    if len(candidates) == 1:
        return candidates
    scales = torch.stack(candidates)
    codes = scales.view(torch.uint8) if scales.itemsize == 1 else scales
    place = torch.zeros(codes.shape, dtype=torch.int64, device=codes.device)
    # A running sum in steps: cumsum along the first dimension takes ten times as long.
    for before, here, new in zip(place[:-1], place[1:], codes[1:] != codes[:-1], strict=True):
        torch.add(before, new, out=here)
    count = int(place[-1].max()) + 1
    if count == len(candidates):
        return candidates
    distinct = codes[-1].expand(count, *codes.shape[1:]).clone()
    return list(distinct.scatter_(0, place, codes).view(scales.dtype).unbind())
