"""GPTQ: columns rounded one by one, each error pushed onto the columns not yet rounded.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), with static group scales: they are stored before the first column is rounded, so columns may
be visited in any order, and the most active inputs go first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec, Rounded

# Columns of one lazy update: errors reach the other columns once a block, by one matrix product.
_BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq:
    """`damping` is added to the Hessian's diagonal as a share of its mean."""

    damping: float = 0.01


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HessianFactor:
    """Upper Cholesky factor U (I, I) of the inverse Hessian, with columns visited in `order` (I,)."""

    upper: Tensor
    order: Tensor


def factorize(hessian: Tensor, settings: Gptq) -> HessianFactor:
    """Factor H = Σ x xᵀ (I, I) once for everything that reads x.

    A column that was never active gets a unit diagonal: its weights do not matter and are rounded to nearest.
    Damping grows tenfold until the factorization succeeds in float32.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    permuted = hessian[order][:, order]
    live = permuted.diagonal() > 0
    mean = float(diagonal.mean())
    permuted.diagonal().copy_(torch.where(live, permuted.diagonal(), mean if mean > 0 else 1.0))
    damping = settings.damping
    while True:
        damped = permuted.clone()
        damped.diagonal().add_(damping * (mean if mean > 0 else 1.0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return HessianFactor(upper=upper, order=order)
        damping *= 10


def gptq(weight: Tensor, start: Rounded, codec: Codec, factor: HessianFactor) -> Rounded:
    """Round weight (O, I) float32 under the scales of `start`, minimising tr(ΔW H ΔWᵀ) greedily.

    Rows are independent, so q/k/v or gate/up stacked along the rows are one call.
    """
    width = weight.shape[1] // start.scale.shape[1]
    scales = codec.scale_value(start.scale, start.global_scale)
    # Columns become contiguous rows of the work array.
    work = weight.T[factor.order].contiguous()
    factors = scales.T[factor.order // width].contiguous()
    values = torch.empty_like(work)
    upper = factor.upper
    columns = work.shape[0]
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty_like(work[begin:end])
        for column in range(begin, end):
            row = work[column]
            value = codec.round(row / factors[column])
            values[column] = value
            error = (row - value * factors[column]) / upper[column, column]
            errors[column - begin] = error
            work[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
        work[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    unpermuted = torch.empty_like(values)
    unpermuted[factor.order] = values
    return Rounded(values=unpermuted.T.contiguous(), scale=start.scale, global_scale=start.global_scale)
