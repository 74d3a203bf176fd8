"""What crosses between driver and workers: small, plain, picklable. Weights never do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prismaquant_ray import errors
from prismaquant_ray.config import Config
from prismaquant_ray.errors import DamagedError, PrismaquantError
from prismaquant_ray.evaluation.variants import Variant
from prismaquant_ray.storage.record import Artifact

#: A boundary activation as bytes: (dtype name, array). Ray moves numpy arrays without copying them.
Activation = tuple[str, NDArray[Any]]


class Stage(StrEnum):
    """A pass over the blocks: two that measure a model, and one that runs it beside what became of it."""

    FORWARD = "forward"
    BACKWARD = "backward"
    EVALUATION = "evaluation"


#: The passes of a run, in order.
PASSES = (Stage.FORWARD, Stage.BACKWARD)


@dataclass(frozen=True, slots=True, order=True)
class Exit:
    """The final norm and head for one microbatch: they keep nothing between microbatches, so any worker takes any."""

    microbatch: int


#: The smallest piece of a pass: what is before the vision tower, the embedding, a block by index, an exit.
Unit = int | Literal["pixels", "entry"] | Exit


def unit_key(unit: Unit) -> str:
    """Its directory in the run store."""
    if isinstance(unit, Exit):
        return f"exit-{unit.microbatch:05d}"
    return unit if isinstance(unit, str) else f"{unit:04d}"


def unit_of(key: str) -> Unit:
    """The unit of a directory in the run store."""
    if key in ("entry", "pixels"):
        return key  # type: ignore[return-value]
    return Exit(int(key.removeprefix("exit-"))) if key.startswith("exit-") else int(key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Consecutive units, in the order of their pass, that one worker holds for one visit.

    `produce` are the blocks whose candidates or prices are missing; the others are run only because something behind
    them needs what they put out. `origins` are the units whose output the first one reads: a block or the entry,
    every exit for the last decoder block of the backward pass; the entry reads the merger, for images.
    """

    stage: Stage
    units: tuple[Unit, ...]
    produce: frozenset[Unit]
    origins: tuple[Unit, ...]
    microbatches: tuple[int, ...]

    @property
    def name(self) -> str:
        """For people and events, e.g. 0004-0007."""
        first, last = unit_key(self.units[0]), unit_key(self.units[-1])
        return first if first == last else f"{first}-{last}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What is run beside the source: plans over the candidates of the run at `candidates`, or a `repository`, or both.

    Each is a URI or an absolute path; None where no variant needs it.
    """

    variants: tuple[Variant, ...]
    candidates: str | None = None
    repository: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """Everything a worker needs to set itself up. `source` and `run` are resolved for any working directory.

    With an `evaluation` it takes part in that, and `run` is where that keeps what it has to.
    """

    name: str
    config: Config
    source: str
    run: str
    evaluation: Evaluation | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An error this project raised on purpose: class name, message, and the stored object it is about, if any."""

    kind: str
    message: str
    key: str = ""

    @classmethod
    def of(cls, error: PrismaquantError) -> Failure:
        """What a worker returns instead of raising."""
        # The nearest class that users know; finer ones stay inside their module.
        kind = next(kind for kind in type(error).__mro__ if kind.__name__ in errors.__all__)
        return cls(
            kind=kind.__name__,
            message=str(error),
            key=error.key if isinstance(error, DamagedError) else "",
        )

    def error(self) -> PrismaquantError:
        """What the driver raises for it."""
        if self.kind == DamagedError.__name__:
            return DamagedError(self.message, self.key)
        kind: type[PrismaquantError] = getattr(errors, self.kind)
        return kind(self.message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a worker says of one call: when it began (seconds since the epoch), figures, or why it failed.

    `stored` are the boundaries, by microbatch, that have reached the run store since the last receipt.
    """

    worker: str
    started: float
    seconds: float
    peak_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[int, Artifact] = field(default_factory=dict)
    failure: Failure | None = None


def to_wire(tensor: Tensor) -> Activation:
    """A tensor as bytes; BF16 has no numpy type, so it travels as 16-bit integers."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return "bfloat16", tensor.view(torch.int16).numpy()
    return str(tensor.dtype).removeprefix("torch."), tensor.numpy()


def from_wire(activation: Activation) -> Tensor:
    """A tensor of its own: arrays from Ray's object store are read-only and shared."""
    name, array = activation
    tensor = torch.from_numpy(np.array(array, copy=True))
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor
