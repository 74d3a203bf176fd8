"""Keys and values on their way into the KV cache: where they are seen, and may be replaced.

transformers' attention hands what it caches to `past_key_values.update` and attends to what that returns: keys after
rotary embedding and norms, and values, as a server caches them. So an object with that method alone sees them in every
architecture, and none of its other code runs differently. compressed-tensors rounds them at the same place.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prismaquant_ray.layout import Block

#: Given an attention's name and its keys and values (sequences, heads, tokens, size): those that are attended to.
Watch = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
_ARGUMENT = "past_key_values"


def cached_paths(module: nn.Module) -> tuple[list[str], str | None]:
    """Paths of the attentions in a block whose cache is seen; the class of one whose cache is not, None without any."""
    found, unseen = [], None
    for path, each in module.named_modules():
        inside = (child for child in each.modules() if child is not each)
        kind: Any = type(each)
        if not _takes_cache(kind) or any(_takes_cache(type(child)) for child in inside):
            continue
        if _only_updates(kind):
            found.append(path)
        elif "Attention" in kind.__name__:  # and not a layer whose module has a state of another kind
            unseen = kind.__name__
    return found, unseen


@contextmanager
def watching(module: nn.Module, block: Block, watch: Watch) -> Iterator[None]:
    """Inside the with-block every cached attention of the block attends to what `watch` returns."""
    handles = []
    for attention in block.attention:
        inner = module.get_submodule(attention.path)
        hook = _entering(inner, _Seen(attention.name, watch))
        handles.append(inner.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seen:
    """Stands for a cache that is empty before, and forgotten after."""

    def __init__(self, name: str, watch: Watch) -> None:
        self.name = name
        self.watch = watch

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.watch(self.name, key, value)


def _entering(module: nn.Module, seen: _Seen) -> Any:
    kind: Any = type(module)
    place = [*_parameters(kind)].index(_ARGUMENT) - 1  # without self

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if len(args) > place:
            return (*args[:place], seen, *args[place + 1 :]), kwargs
        return args, {**kwargs, _ARGUMENT: seen}

    return replace


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(inspect.unwrap(kind.forward)).parameters)


def _takes_cache(kind: Any) -> bool:
    return _ARGUMENT in _parameters(kind)


@functools.cache
def _only_updates(kind: Any) -> bool:
    """Whether the forward of a class calls `update` of its cache, and asks it for nothing else."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    uses = [above[node] for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == _ARGUMENT]
    asked = [use.attr for use in uses if isinstance(use, ast.Attribute)]
    return bool(asked) and {*asked} == {"update"} and all(isinstance(use, ast.Attribute | ast.Compare) for use in uses)
