"""GPTQ: columns rounded one by one, each error pushed onto the columns not yet rounded.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), with static group scales: they are stored before the first column is rounded, so columns may
be visited in any order, and the most active inputs go first. The experts of a layer take each step together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec, Rounded

# Columns of one lazy update: errors reach the other columns once a block, by one matrix product.
_BLOCK = 128
# Rows of a stack taken together: a block of them has to stay in cache while its columns are rounded.
_ROWS = 1 << 12
# Elements of the Hessians factorized together: they are copied a few times.
_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq:
    """`damping` is added to the Hessian's diagonal as a share of its mean."""

    damping: float = 0.01


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HessianFactor:
    """Upper Cholesky factor U (I, I) of the inverse Hessian, with columns visited in `order` (I,); or one an expert."""

    upper: Tensor
    order: Tensor

    def experts(self, start: int, stop: int) -> HessianFactor:
        """Of experts start..stop, as views."""
        return HessianFactor(upper=self.upper[start:stop], order=self.order[start:stop])


def factorize(hessian: Tensor, settings: Gptq) -> HessianFactor:
    """Factor H = Σ x xᵀ (I, I) or (E, I, I) once for everything that reads x.

    A column that was never active gets a unit diagonal: its weights do not matter and are rounded to nearest.
    Damping grows tenfold until the factorization succeeds in float32, for the experts for which it does not.
    """
    stacked = hessian.view(-1, *hessian.shape[-2:])
    order = torch.argsort(stacked.diagonal(dim1=1, dim2=2), descending=True, stable=True)
    chunk = max(1, _CHUNK // stacked[0].numel())
    factors = [
        _inverse_factor(part, visited, settings)
        for part, visited in zip(stacked.split(chunk), order.split(chunk), strict=True)
    ]
    upper = factors[0] if len(factors) == 1 else torch.cat(factors)
    return HessianFactor(upper=upper.view_as(hessian), order=order.view(hessian.shape[:-1]))


def _inverse_factor(hessian: Tensor, order: Tensor, settings: Gptq) -> Tensor:
    """U (E, I, I) for hessian (E, I, I) with its columns in `order` (E, I)."""
    means = hessian.diagonal(dim1=1, dim2=2).mean(1, dtype=torch.float32)
    means = torch.where(means > 0, means, 1.0).unsqueeze(1)
    permuted = _permuted(hessian, order)
    diagonal = permuted.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, means))
    damping = settings.damping
    upper, failed = _damped_factor(permuted, damping * means.double())
    while len(again := torch.nonzero(failed).flatten()):
        damping *= 10
        upper[again], failed[again] = _damped_factor(permuted[again], damping * means[again].double())
    return upper


def _damped_factor(hessian: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """U (E, I, I) of hessian (E, I, I) + damping (E, 1), and which of them are of no use because it failed."""
    damped = hessian.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping.to(damped.dtype))
    lower, failed = torch.linalg.cholesky_ex(damped)
    # Only what can be inverted may be; anything else takes the place of the rest.
    lower[failed > 0] = torch.eye(lower.shape[1], device=lower.device)
    upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper, (failed > 0) | (failed_too > 0)


def _permuted(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of hessian (E, I, I) by order (E, I)."""
    if len(hessian) == 1:
        return hessian[:, order[0]][:, :, order[0]]
    # Whole rows are copied fastest, so columns are permuted as the rows of the transpose.
    first = torch.arange(len(hessian), device=hessian.device).unsqueeze(1) * hessian.shape[1]
    rows = (first + order).flatten()
    half = hessian.flatten(0, 1).index_select(0, rows).view_as(hessian)
    return half.mT.flatten(0, 1).index_select(0, rows).view_as(hessian).mT


def gptq(weight: Tensor, start: Rounded, codec: Codec, factor: HessianFactor) -> Rounded:
    """Round weight (O, I) or (E, O, I) float32 under the scales of `start`, minimising tr(ΔW H ΔWᵀ) greedily.

    Rows are independent, so q/k/v or gate/up stacked along the rows are one call.
    """
    stacked = weight.view(-1, *weight.shape[-2:])
    scales = codec.scale_value(start.scale, start.global_scale).view(len(stacked), stacked.shape[1], -1)
    upper, order = factor.upper.view(-1, *factor.upper.shape[-2:]), factor.order.view(len(stacked), -1)
    experts = max(1, _ROWS // stacked.shape[1])
    parts = []
    for first in range(0, len(stacked), experts):
        some = slice(first, first + experts)
        parts.append(_gptq(stacked[some], scales[some], upper[some], order[some], codec))
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    return Rounded(values=values.view_as(weight), scale=start.scale, global_scale=start.global_scale)


def _gptq(weight: Tensor, scales: Tensor, upper: Tensor, order: Tensor, codec: Codec) -> Tensor:
    """Grid values (E, O, I) for weight (E, O, I), scales (E, O, G), upper (E, I, I) and order (E, I)."""
    experts, rows, columns = weight.shape
    groups = scales.shape[2]
    # Columns become contiguous rows (E·O) of the work array, in the order of each expert.
    expert = torch.arange(experts, device=weight.device).unsqueeze(1)
    source = (expert * columns + order).T.flatten()
    group = (expert * groups + order // (columns // groups)).T.flatten()
    # One matrix has no dimension for its expert: its operations are faster.
    shape = (columns, experts, rows) if experts > 1 else (columns, rows)
    work = weight.mT.contiguous().flatten(0, 1).index_select(0, source).view(shape)
    factors = scales.mT.contiguous().flatten(0, 1).index_select(0, group).view(shape)
    upper = upper if experts > 1 else upper.squeeze(0)
    values = torch.empty_like(work)
    pivots = upper.diagonal(dim1=-2, dim2=-1).movedim(-1, 0).unsqueeze(-1)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        block, errors = work[begin:end], torch.empty_like(work[begin:end])
        of_columns = zip(block, factors[begin:end], values[begin:end], errors, pivots[begin:end], strict=True)
        for column, (row, factor, value, error, pivot) in enumerate(of_columns, start=begin):
            value.copy_(codec.round(row / factor))
            torch.sub(row, value * factor, out=error).div_(pivot)
            _push(work[column + 1 : end], upper[..., column, column + 1 : end], error)
        _push_block(work[end:], upper[..., begin:end, end:], errors)
    unpermuted = torch.empty_like(values).view(columns * experts, rows)
    unpermuted[source] = values.view(columns * experts, rows)
    return unpermuted.view(experts, columns, rows).mT.contiguous()


def _push(work: Tensor, upper: Tensor, error: Tensor) -> None:
    """work −= upper ⊗ error: (columns, O), (columns,) and (O,); or (columns, E, O), (E, columns) and (E, O)."""
    if work.dim() == 2:
        work.addr_(upper, error, alpha=-1)
    else:
        work.addcmul_(upper.T.unsqueeze(2), error, value=-1)


def _push_block(work: Tensor, upper: Tensor, errors: Tensor) -> None:
    """work −= upperᵀ errors: (columns, O), (block, columns) and (block, O); or with E as in `_push`."""
    if work.dim() == 2:
        work.addmm_(upper.T, errors, alpha=-1)
    else:
        work.transpose(0, 1).baddbmm_(upper.mT, errors.transpose(0, 1), alpha=-1)
