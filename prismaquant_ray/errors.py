"""Errors a user can act on, each with the exit code the command line returns for it.

```
PrismaquantError          exit 1
├── InputError            exit 2   model, calibration, budget or output cannot be used as given
│   └── ConfigError       exit 2   the YAML or a --set is wrong
├── ResourceError         exit 3   the machine or cluster cannot do it now
│   └── DeviceMemoryError exit 3   a GPU has no memory left for a shard
└── StoreError            exit 3   the run store is unreachable or cannot be trusted
    └── DamagedError      exit 3   one stored object is missing or is not what its record says
```

Any other exception is a bug and ends with exit code 1; that of a worker arrives as `WorkerBugError`. Instances survive
pickling between actors unchanged.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DamagedError",
    "DeviceMemoryError",
    "InputError",
    "PrismaquantError",
    "ResourceError",
    "StoreError",
    "WorkerBugError",
]


class PrismaquantError(Exception):
    """Base of every error this project raises on purpose. The message is one line: what, which, what to do."""

    exit_code = 1


class InputError(PrismaquantError):
    """The model, calibration data, budget or output directory cannot be used as given."""

    exit_code = 2


class ConfigError(InputError):
    """The configuration file or an override is wrong."""


class ResourceError(PrismaquantError):
    """The environment (cluster, memory, storage) cannot do what was asked."""

    exit_code = 3


class DeviceMemoryError(ResourceError):
    """A GPU has no memory left for a shard. With fewer blocks it may have enough."""


class WorkerBugError(Exception):
    """A worker raised something that no other class here stands for: `kind` and `text` of it, and in which call."""

    def __init__(self, kind: str, text: str, where: str) -> None:
        super().__init__(f"{kind}: {text} ({where})")
        self.parts = kind, text, where

    def __reduce__(self) -> tuple[type[WorkerBugError], tuple[str, str, str]]:
        return WorkerBugError, self.parts


class StoreError(PrismaquantError):
    """The run store cannot be read, written or trusted."""

    exit_code = 3


class DamagedError(StoreError):
    """The stored object `key` is missing or is not what its record says. The work that made it can be done again."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type[DamagedError], tuple[str, str]]:
        return DamagedError, (str(self), self.key)
