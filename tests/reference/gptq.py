"""GPTQ as the paper's algorithm reads, one column at a time, without blocks, permutation tricks or stacking."""

from __future__ import annotations

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec, Rounded


def textbook(weight: Tensor, start: Rounded, codec: Codec, hessian: Tensor, damping: float) -> Tensor:
    """Dequantized grid values × scales (O, I) in float64; columns by falling diagonal, inverse by elimination."""
    width = weight.shape[1] // start.scale.shape[1]
    scales = codec.scale_value(start.scale, start.global_scale).double()
    H = hessian.double()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    inverse = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64))
    work, out = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for column in order:
        scale = scales[:, column // width]
        value = codec.round((work[:, column] / scale).float()).double() * scale
        out[:, column] = value
        error = (work[:, column] - value) / inverse[column, column]
        work -= error.unsqueeze(1) * inverse[column].unsqueeze(0)
        # Eliminate the column: what remains is the inverse of the Hessian without it.
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0
    return out
