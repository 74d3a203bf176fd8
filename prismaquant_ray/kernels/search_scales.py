"""The search for group scales: every candidate of a group judged by one program, which reads the group once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismaquant_ray.formats import codec_named
from prismaquant_ray.formats.base import Codec, grouped
from prismaquant_ray.kernels.grid import constants, on_grid

# Weights of a program.
_WEIGHTS = 2048
# Weights whose candidates are in memory at a time: about 26 bytes a weight, with 32 candidates for 16 of them.
_PIECE = 1 << 25


def launch_search_scales(
    weight: Tensor, global_scale: Tensor | None, importance: Tensor, multipliers: Tensor, codec: str
) -> Tensor:
    """See `forward.scale_search`."""
    experts, _, columns = weight.shape
    pieces = weight.split(max(1, _PIECE // (experts * columns)), dim=1)
    found = [_search(piece, global_scale, importance, multipliers, codec_named(codec)) for piece in pieces]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _search(
    weight: Tensor, global_scale: Tensor | None, importance: Tensor, multipliers: Tensor, grid: Codec
) -> Tensor:
    groups = importance.shape[1] // grid.width(importance.shape[1])
    weight = grouped(weight.contiguous(), groups)
    # Repetitions are tried, too: to leave them out, the host would have to wait for their number.
    candidates = grid.scale_candidates(weight.abs().amax(-1), global_scale, multipliers).contiguous()
    if len(candidates) == 1:
        return candidates[0]
    factors = grid.scale_value(candidates, global_scale)
    width = weight.shape[-1]
    best = torch.empty(factors.shape[1:], dtype=torch.int64, device=weight.device)
    at_once = _WEIGHTS // width
    search_kernel[triton.cdiv(best.numel(), at_once),](
        weight,
        factors,
        importance.contiguous(),
        best,
        best.numel(),
        best[0].numel(),
        groups,
        len(candidates),
        WIDTH=width,
        AT_ONCE=at_once,
        **constants(grid),
        # The reference rounds products before it adds them.
        enable_fp_fusion=False,
    )
    # Float8 has no gather.
    raw = candidates.view(torch.uint8) if candidates.itemsize == 1 else candidates
    return raw.gather(0, best.unsqueeze(0)).squeeze(0).view(candidates.dtype)


@triton.jit
def search_kernel(
    weight,
    factors,
    importance,
    best,
    count,
    of_expert,
    of_row,
    candidates,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SMALLEST: tl.constexpr,
    STEP: tl.constexpr,
):
    """weight (count, WIDTH), factors (candidates, count), importance (E, of_row, WIDTH); `best` (count,) is written.

    A row has `of_row` groups, an expert `of_expert`.
    """
    group = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    there = group < count
    place = tl.arange(0, WIDTH)
    w = tl.load(weight + group[:, None] * WIDTH + place[None, :], mask=there[:, None], other=0.0)
    read = group // of_expert * of_row + group % of_row
    matter = tl.load(importance + read[:, None] * WIDTH + place[None, :], mask=there[:, None], other=0.0)
    least = tl.zeros((AT_ONCE,), tl.float32)
    winner = tl.zeros((AT_ONCE,), tl.int64)
    for candidate in range(candidates):
        factor = tl.load(factors + candidate * tl.cast(count, tl.int64) + group, mask=there, other=1.0)[:, None]
        difference = on_grid(tl.div_rn(w, factor), LOW, HIGH, SMALLEST, STEP) * factor - w
        error = tl.sum(difference * difference * matter, 1)
        better = (error < least) | (candidate == 0)
        least = tl.where(better, error, least)
        winner = tl.where(better, candidate, winner)
    tl.store(best + group, winner, mask=there)
