"""What crosses between driver and workers: small, plain, picklable. Weights never do."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prismaquant_ray.config import Config

#: A boundary activation as bytes: (dtype name, array). Ray moves numpy arrays without copying them.
Activation = tuple[str, NDArray[Any]]


class Stage(StrEnum):
    """A pass over the blocks."""

    FORWARD = "forward"
    BACKWARD = "backward"


#: What a visit loads: the embedding, a decoder block by index, or the final norm and head.
Unit = int | Literal["entry", "exit"]


def unit_key(unit: Unit) -> str:
    """Its directory in the run store."""
    return unit if isinstance(unit, str) else f"{unit:04d}"


def record_key(stage: Stage, unit: Unit) -> str:
    """Where the record of a finished visit is."""
    return f"{stage}/{unit_key(unit)}/record.json"


#: Artifacts whose names start so are boundary activations or gradients: needed by the next unit, then deleted.
BOUNDARY = "boundary-"


def boundary_name(microbatch: int) -> str:
    """Name of a boundary activation or gradient among a record's artifacts."""
    return f"{BOUNDARY}{microbatch:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """Everything a worker needs to set itself up. `source` is the resolved directory of the model."""

    name: str
    config: Config
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An error this project raised on purpose: class name, message and the exit code it asks for."""

    kind: str
    message: str
    exit_code: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a worker says of one call: figures, or why it failed."""

    worker: str
    seconds: float
    peak_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)
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
