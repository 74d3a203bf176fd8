"""Recording the inputs and outputs of a block's matrices while the block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.layout import Block, InputGroup, Matrix
from prismaquant_ray.model.attention_cache import Watch, watching
from prismaquant_ray.model.experts import Routing


class CapturedActivations:
    """Filled by running the block once inside `capture_activations`.

    `inputs` by input group: (sequences, tokens, I), or for experts rows (R, I) sorted by expert, with their `routing`.
    `outputs` by parameter: (sequences, tokens, O) of a Linear, or rows (R, O) of a packed matrix. `entries` by
    parameter: a view of its input that nothing else reads, so that its gradient is that through this parameter alone.
    `cached` by attention: the keys and values that it caches (sequences, heads, tokens, size).
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.entries: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.routing: dict[str, Routing] = {}
        self.cached: dict[str, tuple[Tensor, Tensor]] = {}


@contextmanager
def capture_activations(module: nn.Module, block: Block) -> Iterator[CapturedActivations]:
    """Record every input group, the output of every parameter of its matrices, and what is cached.

    Raises:
        InputError: Linears that should share an input do not. Then the family's fused rules are wrong, and every
            Hessian would be, too.
    """
    captured = CapturedActivations()
    handles = []
    watched: list[Any] = []
    for group in block.inputs:
        for matrix in group.matrices:
            if matrix.experts is not None:
                experts = module.get_submodule(matrix.parameters[0].rpartition(".")[0])
                watched.append(experts)
                _watch(experts, captured, group, matrix)
                continue
            for parameter in matrix.parameters:
                submodule = module.get_submodule(parameter.rpartition(".")[0])
                handles.append(submodule.register_forward_pre_hook(_entering(captured, group.name, parameter)))
                handles.append(submodule.register_forward_hook(_leaving(captured, parameter)))
    try:
        with watching(module, block, _caching(captured)):
            yield captured
    finally:
        for handle in handles:
            handle.remove()
        for experts in watched:
            experts.watcher = None


def _entering(captured: CapturedActivations, group: str, parameter: str) -> Any:
    def record(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = args
        seen = captured.inputs.setdefault(group, x)
        if seen is not x:
            raise InputError(
                f"{parameter} does not read the tensor that {group} reads; correct the family's fused rules"
            )
        entry = captured.entries[parameter] = x.view_as(x)
        return (entry,)

    return record


def _leaving(captured: CapturedActivations, parameter: str) -> Any:
    def record(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        captured.outputs[parameter] = output

    return record


def _caching(captured: CapturedActivations) -> Watch:
    def record(name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Views, which nothing else reads: some attentions use what they cached in other ways, too.
        found = captured.cached[name] = key.view_as(key), value.view_as(value)
        return found

    return record


def _watch(experts: Any, captured: CapturedActivations, group: InputGroup, matrix: Matrix) -> None:
    """Record one packed parameter; the experts module may be watched for several."""
    before = getattr(experts, "watcher", None)
    parameter = matrix.parameters[0]

    def watch(name: str, rows: Tensor, output: Tensor, routing: Routing) -> None:
        if before is not None:
            before(name, rows, output, routing)
        if name == parameter.rpartition(".")[2]:
            captured.inputs[group.name] = captured.entries[parameter] = rows
            captured.outputs[parameter], captured.routing[group.name] = output, routing

    experts.watcher = watch
