"""prismaquant-ray: mixed-precision quantization of large language models as a Ray job.

The public names, described in docs/api.md. Each is imported when it is first used: importing this package costs no
torch. The stages of a run are those of `jobs.pipeline`; nothing inside this package imports them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.pipeline.library import OpenRun, dequantize, evaluate, inspect, open_run, quantize, verify
    from prismaquant_ray.allocation.frontier import frontier, knee
    from prismaquant_ray.allocation.problem import AllocationProblem, Plan
    from prismaquant_ray.allocation.solver import solve
    from prismaquant_ray.config import Config, load_config
    from prismaquant_ray.errors import (
        ConfigError,
        DamagedError,
        InputError,
        PrismaquantError,
        ResourceError,
        StoreError,
    )
    from prismaquant_ray.events import Event
    from prismaquant_ray.formats import FORMATS, FormatName
    from prismaquant_ray.forward.quantize_weight import dequantize_weight, quantize_weight
    from prismaquant_ray.settings.budget import BudgetConfig

# Here and not in the package's metadata: a working directory has none, and may be newer than what is installed.
__version__ = "0.5.0"

__all__ = [
    "FORMATS",
    "AllocationProblem",
    "BudgetConfig",
    "Config",
    "ConfigError",
    "DamagedError",
    "Event",
    "FormatName",
    "InputError",
    "OpenRun",
    "Plan",
    "PrismaquantError",
    "ResourceError",
    "StoreError",
    "dequantize",
    "dequantize_weight",
    "evaluate",
    "frontier",
    "inspect",
    "knee",
    "load_config",
    "open_run",
    "quantize",
    "quantize_weight",
    "solve",
    "verify",
]

_HOMES = {
    "jobs.pipeline.library": ("OpenRun", "dequantize", "evaluate", "inspect", "open_run", "quantize", "verify"),
    "prismaquant_ray.allocation.frontier": ("frontier", "knee"),
    "prismaquant_ray.allocation.problem": ("AllocationProblem", "Plan"),
    "prismaquant_ray.allocation.solver": ("solve",),
    "prismaquant_ray.config": ("Config", "load_config"),
    "prismaquant_ray.settings.budget": ("BudgetConfig",),
    "prismaquant_ray.errors": (
        "ConfigError",
        "DamagedError",
        "InputError",
        "PrismaquantError",
        "ResourceError",
        "StoreError",
    ),
    "prismaquant_ray.events": ("Event",),
    "prismaquant_ray.formats": ("FORMATS", "FormatName"),
    "prismaquant_ray.forward.quantize_weight": ("dequantize_weight", "quantize_weight"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
