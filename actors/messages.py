"""Messages between driver and workers: small, plain, picklable. Weights are never sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prismaquant_ray import __version__, errors
from prismaquant_ray.errors import DamagedError, PrismaquantError, ResourceError
from prismaquant_ray.events import Machine, StepMetrics

if TYPE_CHECKING:
    from actors.diagnosis import WorkerDiagnosis
    from prismaquant_ray.config import Config
    from prismaquant_ray.evaluation.variants import Variant
    from prismaquant_ray.preflight import Preflight
    from prismaquant_ray.storage.record import Artifact


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Models compared with the source: plans over the candidates of the run at `candidates`, a `repository`, or both.

    Each is a URI or an absolute path; None where no variant needs it.
    """

    variants: tuple[Variant, ...]
    candidates: str | None = None
    repository: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """Everything a worker needs to set itself up. `source` and `run` are resolved for any working directory.

    `revision` is the commit of a hub id that the driver has opened, so that all read the same.
    With an `evaluation` it runs that instead of a measurement, and `run` is the evaluation's own store. `gpu`: the
    cluster gave it a GPU.
    """

    name: str
    config: Config
    source: str
    revision: str
    run: str
    evaluation: Evaluation | None = None
    gpu: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An error this project raised on purpose: class name, message, and the stored object it is about, if any."""

    kind: str
    message: str
    key: str = ""

    @classmethod
    def of(cls, error: PrismaquantError) -> Failure:
        """The failure that a worker returns instead of raising."""
        # The nearest class that users know; finer ones stay inside their module.
        kind = next(kind for kind in type(error).__mro__ if kind.__name__ in errors.__all__)
        return cls(
            kind=kind.__name__,
            message=str(error),
            key=error.key if isinstance(error, DamagedError) else "",
        )

    def error(self) -> PrismaquantError:
        """The error that the driver raises for it."""
        if self.kind == DamagedError.__name__:
            return DamagedError(self.message, self.key)
        kind: type[PrismaquantError] = getattr(errors, self.kind)
        return kind(self.message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """A worker's account of one call: when it began (seconds since the epoch), its metrics, or why it failed.

    `machine` is set in reply to HELLO and SETUP. `stored` are the boundaries, by microbatch, that have reached
    the run store since the last receipt. `preflight` is set in reply to PREFLIGHT, `diagnosis` to DIAGNOSE.
    """

    worker: str
    started: float
    seconds: float
    peak_bytes: int
    machine: Machine | None = None
    metrics: StepMetrics = field(default_factory=StepMetrics)
    stored: Mapping[int, Artifact] = field(default_factory=dict)
    failure: Failure | None = None
    preflight: Preflight | None = None
    diagnosis: WorkerDiagnosis | None = None


def check_version(receipt: Receipt) -> Machine:
    """The machine of a worker that said HELLO; ResourceError when it has another version of this project."""
    machine = receipt.machine
    assert machine is not None
    if machine.version != __version__:
        raise ResourceError(
            f"a worker on {machine.host} has prismaquant-ray {machine.version}, the driver {__version__}; "
            "use the same image everywhere"
        )
    return machine
