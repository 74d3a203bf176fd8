"""The reference of the library, from its signatures and docstrings: `python docs/api.py > docs/api.md`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import prismaquant_ray

_INTRODUCTION = """\
# The library

<!-- From the docstrings of the public names, by `python docs/api.py > docs/api.md`. The examples are run by a test. -->

`from prismaquant_ray import …` gives these names; importing the package costs no torch. Results are dataclasses, and
nothing is printed: `on_event` is called with every event. A longer example, cell by cell:
[library_example.py](library_example.py).

```python
from pathlib import Path
from prismaquant_ray import BudgetConfig, load_config, open_run

config = load_config(Path("config.yaml"))
run = open_run(config, on_event=lambda event: None)
plan = run.plan(BudgetConfig(bpp=6.5))  # measures first, once
assert plan.bpp <= 6.5
repository = run.assemble(plan, "repository-6.5")
assert (Path("repository-6.5") / "config.json").is_file()
```

One weight matrix by itself:

```python
import torch
from prismaquant_ray import dequantize_weight, quantize_weight

weight = torch.randn(64, 128)
tensors = quantize_weight(weight, "NVFP4", inputs=torch.randn(256, 128))
assert sorted(tensors) == ["input_global_scale", "weight_global_scale", "weight_packed", "weight_scale"]
assert dequantize_weight(tensors, "NVFP4").shape == weight.shape
```

The allocator by itself: any costs, any sizes.

```python
import numpy as np
from prismaquant_ray import AllocationProblem, frontier, solve

problem = AllocationProblem(
    groups=("a", "b"),
    formats=("small", "large"),
    cost=np.array([[3.0, 1.0], [5.0, 0.5]]),
    size=np.array([[10, 20], [10, 30]]),
)
plan = solve(problem, 40)
assert plan.choice == {"a": "small", "b": "large"}
assert frontier(problem).bytes[0] == 20
```

Errors are those of `prismaquant_ray.errors`: every one derives from `PrismaquantError` and has the exit code that the
command line would return.
"""
_SECTIONS = {
    "Configuration": ("load_config", "Config", "BudgetConfig"),
    "Whole jobs": ("inspect", "quantize", "verify", "evaluate", "dequantize"),
    "A run": ("open_run", "OpenRun"),
    "One weight": ("quantize_weight", "dequantize_weight"),
    "Allocation": ("AllocationProblem", "Plan", "solve", "frontier", "knee"),
    "Formats and events": ("FORMATS", "FormatName", "Event"),
    "Errors": ("PrismaquantError", "InputError", "ConfigError", "ResourceError", "StoreError", "DamagedError"),
}


class _Text(str):
    """An annotation; a signature shows it without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _signature(name: str, thing: Callable[..., Any]) -> str:
    """A function with its arguments, or a dataclass with its fields."""
    signature = inspect.signature(thing)
    parameters = [
        each.replace(annotation=_Text(each.annotation)) for each in signature.parameters.values() if each.name != "self"
    ]
    # Of a constructor it is None itself, of a function it is text.
    returned = signature.return_annotation
    shown = signature.replace(
        parameters=parameters, return_annotation=signature.empty if returned is None else _Text(returned)
    )
    # A function as a default is shown by its name, not by where it is in memory.
    return name + re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", str(shown))


def _described(name: str, thing: Any) -> str:
    """Signature and docstring."""
    text = f"```text\n{inspect.getdoc(thing) or ''}\n```\n"
    if isinstance(thing, property):
        return f"```python\n{name}: {inspect.signature(thing.fget).return_annotation}\n```\n\n{text}"
    if inspect.isfunction(thing) or dataclasses.is_dataclass(thing):
        return f"```python\n{_signature(name, thing)}\n```\n\n{text}"
    return text


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, by name."""
    for name, member in inspect.getmembers(kind):
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield name, member


def _results(functions: list[Callable[..., Any]]) -> dict[str, type]:
    """The dataclasses that functions return, with their bases, as far as they are not public names themselves."""
    returned = [typing.get_type_hints(each)["return"] for each in functions]
    found = {base.__name__: base for kind in returned if dataclasses.is_dataclass(kind) for base in kind.__mro__[:-1]}
    return {name: kind for name, kind in sorted(found.items()) if name not in prismaquant_ray.__all__}


def render() -> str:
    """docs/api.md."""
    parts = [_INTRODUCTION]
    functions = []
    for title, names in _SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            thing = getattr(prismaquant_ray, name)
            parts += [f"### {name}\n", _described(name, thing)]
            members = dict(_members(thing)) if name == "OpenRun" else {}
            parts += [_described(each, member) for each, member in members.items()]
            callables = [thing, *(each.fget if isinstance(each, property) else each for each in members.values())]
            functions += [each for each in callables if inspect.isfunction(each)]
    parts.append("## Results\n")
    for name, kind in _results(functions).items():
        parts += [f"### {name}\n", _described(name, kind)]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render())
