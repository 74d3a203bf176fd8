"""The reference of the library, from its signatures and docstrings: `python docs/api.py > docs/api.md`."""

from __future__ import annotations

import inspect
import re
import sys

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


def _described(name: str, thing: object) -> str:
    """A heading with the signature, and the docstring."""
    text = inspect.getdoc(thing) or ""
    if not inspect.isfunction(thing):
        return f"```text\n{text}\n```\n"
    # Annotations are text, which is quoted; a function is shown by its name, not by where it is in memory.
    signature = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", str(inspect.signature(thing)).replace("'", ""))
    return f"```python\n{name}{signature}\n```\n\n```text\n{text}\n```\n"


def render() -> str:
    """docs/api.md."""
    parts = [_INTRODUCTION]
    for title, names in _SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            thing = getattr(prismaquant_ray, name)
            parts += [f"### {name}\n", _described(name, thing)]
            if inspect.isclass(thing) and name == "OpenRun":
                methods = inspect.getmembers(thing, inspect.isfunction)
                parts += [_described(m, f) for m, f in methods if not m.startswith("_")]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render())
