"""Watching what a block's Linears read and write while the block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.layout import Block


class Taps:
    """Inputs by input group and outputs by Linear, filled by running the block once inside `tapped`."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}


@contextmanager
def tapped(module: nn.Module, block: Block) -> Iterator[Taps]:
    """Record the input (sequences, tokens, I) of every input group and the output of every Linear.

    Raises InputError when Linears that should share an input do not: the family's fused rules are wrong then, and
    every Hessian would be too.
    """
    taps = Taps()
    handles = []
    cut = len(block.prefix) + 1
    for group in block.inputs:
        for linear in group.linears:
            submodule = module.get_submodule(linear.name[cut:])
            handles.append(submodule.register_forward_hook(_recorder(taps, group.name, linear.name)))
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _recorder(taps: Taps, group: str, linear: str) -> Any:
    def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0]
        seen = taps.inputs.setdefault(group, x)
        if seen is not x:
            raise InputError(f"{linear} does not read the tensor that {group} reads; correct the family's fused rules")
        taps.outputs[linear] = output

    return record
