"""GPTQ: columns rounded one by one, each error compensated by the columns not yet rounded.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), with static group scales: they are stored before the first column is rounded, so columns may
be visited in any order, and the most active inputs go first. The experts of a layer take each step together.

Computed without the inverse of the Hessian, as Chee et al., "QuIP" (arXiv 2307.13304), section 3, write it. With
H = U D Uᵀ, U upper triangular with a unit diagonal, the output error of ΔW = W − Ŵ is

    tr(ΔW H ΔWᵀ) = Σ_k D_k |ΔW u_k|²,    ΔW u_k = Δw_k + Σ_{j<k} Δw_j U_jk,

so that column k, once those before it are rounded, is best rounded from w_k + Σ_{j<k} Δw_j U_jk, which is the value
that GPTQ computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.formats import codec_named
from prismaquant_ray.formats.base import Codec, Rounded
from prismaquant_ray.kernels import operator

# Columns per block, between which errors are propagated by matrix products; a power of two.
_BLOCK = 8
# Rows processed together, of all experts: they stay in cache, and are too few for torch to split over threads, which
# would cost more than it saves. The matrix products use all threads.
_ROWS = 1 << 12
# Elements of the Hessians factorized together: they are copied a few times.
_CHUNK = 1 << 24
# Columns of a Hessian that is factorized alone on a GPU.
_LARGE = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq:
    """`damping` is added to the Hessian's diagonal as a share of its mean."""

    damping: float = 0.01


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HessianFactor:
    """U (I, I) of H = U D Uᵀ, rows and columns in the `order` (I,) of visits; or per expert, (E, I, I) and (E, I).

    `upper` is upper triangular and has a unit diagonal.
    """

    upper: Tensor
    order: Tensor

    def experts(self, start: int, stop: int) -> HessianFactor:
        """Of experts start..stop, as views."""
        return HessianFactor(upper=self.upper[start:stop], order=self.order[start:stop])


def factorize(hessian: Tensor, settings: Gptq) -> HessianFactor:
    """Factor H = Σ x xᵀ (I, I) or (E, I, I) once for everything that reads x.

    A column that was never active gets the mean of the diagonal: its weights do not matter and are rounded to nearest.
    For experts whose factorization fails in float32, damping grows tenfold until it succeeds.
    """
    stacked = hessian.view(-1, *hessian.shape[-2:])
    order = torch.argsort(stacked.diagonal(dim1=1, dim2=2), descending=True, stable=True)
    chunk = max(1, _CHUNK // stacked[0].numel())
    factors = [
        _unit_factor(part, visited, settings)
        for part, visited in zip(stacked.split(chunk), order.split(chunk), strict=True)
    ]
    upper = factors[0] if len(factors) == 1 else torch.cat(factors)
    # Factorizations leave columns contiguous, and a GPU's kernel wants rows: copied once for all codecs.
    upper = upper if upper.is_cpu else upper.contiguous()
    return HessianFactor(upper=upper.view_as(hessian), order=order.view(hessian.shape[:-1]))


def _unit_factor(hessian: Tensor, order: Tensor, settings: Gptq) -> Tensor:
    """U (E, I, I) for hessian (E, I, I) with its columns in `order` (E, I)."""
    means = hessian.diagonal(dim1=1, dim2=2).mean(1, dtype=torch.float32)
    means = torch.where(means > 0, means, 1.0).unsqueeze(1)
    # The lower factor L of the columns in reverse is, read backwards, the upper one: H = L Lᵀ, U = L / diag(L).
    reverse = _permuted(hessian, order.flip(1))
    diagonal = reverse.diagonal(dim1=1, dim2=2).clone()
    diagonal = torch.where(diagonal > 0, diagonal, means)
    damping = settings.damping
    lower, failed = _cholesky(reverse, diagonal + damping * means)
    while len(again := torch.nonzero(failed).flatten()):
        damping *= 10
        lower[again], failed[again] = _cholesky(reverse[again], diagonal[again] + damping * means[again])
    return lower.div_(lower.diagonal(dim1=1, dim2=2).unsqueeze(1).clone()).flip(1, 2)


def _cholesky(hessian: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """L (E, I, I) of hessian (E, I, I), whose diagonal is replaced in place; where it failed, bool (E,)."""
    hessian.diagonal(dim1=1, dim2=2).copy_(diagonal)
    # A GPU factorizes a large matrix faster than its share of a batch.
    alone = not hessian.is_cpu and hessian.shape[-1] > _LARGE
    found = [torch.linalg.cholesky_ex(part) for part in hessian.split(1 if alone else len(hessian))]
    lower, failed = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
    return lower, failed > 0


def _permuted(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of hessian (E, I, I) by order (E, I)."""
    if len(hessian) == 1:
        return hessian[0].index_select(0, order[0]).index_select(1, order[0]).unsqueeze(0)
    # Whole rows are copied fastest, so columns are permuted as the rows of the transpose.
    rows = _flat(order)
    half = hessian.flatten(0, 1).index_select(0, rows).view_as(hessian)
    return half.mT.flatten(0, 1).index_select(0, rows).view_as(hessian).mT


def _flat(order: Tensor, count: int | None = None) -> Tensor:
    """Flat indices of entries `order` (E, n) in an (E, count) array; count defaults to n."""
    experts = torch.arange(len(order), device=order.device).unsqueeze(1)
    return (experts * (count or order.shape[1]) + order).flatten()


def gptq(weight: Tensor, start: Rounded, codec: Codec, factor: HessianFactor) -> Rounded:
    """Round weight (O, I) or (E, O, I) float32 under the scales of `start`, minimising tr(ΔW H ΔWᵀ) greedily.

    Rows are independent, so q/k/v or gate/up stacked along the rows are one call.
    """
    stacked = weight.view(-1, *weight.shape[-2:])
    scales = codec.scale_value(start.scale, start.global_scale).view(len(stacked), stacked.shape[1], -1)
    upper, order = factor.upper.view(-1, *factor.upper.shape[-2:]), factor.order.view(len(stacked), -1)
    values = gptq_values(stacked, scales, upper, order, codec.name)
    return Rounded(values=values.view_as(weight), scale=start.scale, global_scale=start.global_scale)


def _gptq_values(weight: Tensor, factors: Tensor, upper: Tensor, order: Tensor, codec: str) -> Tensor:
    values = torch.empty_like(weight)
    experts = max(1, _ROWS // weight.shape[1])
    for first in range(0, len(weight), experts):
        some = slice(first, first + experts)
        pieces = (each[some].split(_ROWS, dim=1) for each in (weight, factors, values))
        for weights, scales, rounded in zip(*pieces, strict=True):
            _transposed(_by_column(weights, scales, upper[some], order[some], codec_named(codec)), rounded)
    return values


#: Grid values (E, O, I) for weight (E, O, I), the factors of its groups (E, O, G), and U (E, I, I) in order (E, I).
gptq_values = operator(
    "gptq_values(Tensor weight, Tensor factors, Tensor upper, Tensor order, str codec) -> Tensor", _gptq_values
)


def _by_column(weight: Tensor, scales: Tensor, upper: Tensor, order: Tensor, codec: Codec) -> Tensor:
    """Grid values (E, I, O), by column, for weight (E, O, I), scales (E, O, G), upper (E, I, I) and order (E, I)."""
    experts, rows, columns = weight.shape
    groups = scales.shape[2]
    # Columns become contiguous rows, in visiting order. `work` holds targets, then grid values; `delta` W, then ΔW.
    # Buffers are reused, because faulting in fresh memory costs more than the arithmetic on it.
    delta = _transposed(weight, torch.empty(experts, columns, rows, device=weight.device))
    work = delta.flatten(0, 1).index_select(0, _flat(order)).view_as(delta)
    delta.copy_(work)
    scales = scales.mT.contiguous().flatten(0, 1)
    group = order // (columns // groups)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        factors = scales.index_select(0, _flat(group[:, begin:end], groups)).view(experts, end - begin, rows)
        for column in range(begin, end):
            row, error, factor = work[:, column], delta[:, column], factors[:, column - begin]
            row.copy_(codec.round(row / factor))
            error.addcmul_(row, factor, value=-1)
            later = slice(column + 1, end)
            work[:, later].addcmul_(upper[:, column, later].unsqueeze(2), error.unsqueeze(1))
        # Products of equal halves of 2, 4, 8 … blocks: each error reaches each later column once, and most errors in
        # large products.
        reach = end & -end
        last, following = slice(end - reach, end), slice(end, end + reach)
        work[:, following].baddbmm_(upper[:, last, following].mT, delta[:, last])
    torch.index_select(work.flatten(0, 1), 0, _flat(order.argsort()), out=delta.flatten(0, 1))
    return delta


def _transposed(matrices: Tensor, out: Tensor) -> Tensor:
    """Matrices (E, m, n) as (E, n, m), written to `out`; one by one, which takes half the time."""
    for matrix, transposed in zip(matrices, out, strict=True):
        transposed.copy_(matrix.T)
    return out
