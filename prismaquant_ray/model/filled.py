"""Weights that are one number everywhere: they cost no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def filled(module: nn.Module, value: float) -> Iterator[None]:
    """Inside the with-block parameters and buffers on the meta device are real, and one number everywhere."""
    saved: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        saved.append((part, dict(part._parameters), dict(part._buffers)))
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_full(parameter, value), requires_grad=False)
                part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = _full(buffer, value)
    try:
        yield
    finally:
        for part, parameters, buffers in saved:
            part._parameters.update(parameters)
            part._buffers.update(buffers)


def _full(tensor: Tensor, value: float) -> Tensor:
    if value:
        # One number, at every place.
        return torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)
