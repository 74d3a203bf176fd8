"""The actor that owns blocks while they are visited. It calls the core, commits to the store, returns receipts.

A plain class: the driver wraps it with `ray.remote`, tests call it directly.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from actors.messages import (
    Activation,
    Failure,
    Receipt,
    Stage,
    Unit,
    WorkerSpec,
    boundary_name,
    from_wire,
    record_key,
    to_wire,
    unit_key,
)
from prismaquant_ray.calibration.text import CalibrationSet
from prismaquant_ray.checkpoint.reader import Checkpoint
from prismaquant_ray.errors import PrismaquantError, StoreError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.models.runner import ModelRunner
from prismaquant_ray.rounding.encode import Rounding
from prismaquant_ray.rounding.forward_pass import ForwardVisit
from prismaquant_ray.rounding.gptq import Gptq
from prismaquant_ray.rounding.scale_search import ScaleSearch
from prismaquant_ray.sensitivity.backward_pass import BackwardVisit
from prismaquant_ray.sensitivity.fisher import exit_gradient
from prismaquant_ray.storage.record import (
    Artifact,
    Record,
    new_attempt,
    read_record,
    read_tensors,
    write_record,
    write_tensors,
)
from prismaquant_ray.storage.store import Store


class Visit:
    """A unit while it is loaded: boundary artifacts written so far and, for a block, the core's own visit."""

    def __init__(self, core: ForwardVisit | BackwardVisit | None, attempt: str) -> None:
        self.core = core
        self.attempt = attempt
        self.resident = ExitStack()
        self.artifacts: dict[str, Artifact] = {}
        self.loss = 0.0


class ShardWorker:
    """Runs visits. The constructor does nothing that can fail; `setup` loads."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.visits: dict[tuple[Stage, Unit], Visit] = {}

    def setup(self) -> Receipt:
        """Open the checkpoint and the run store, build the skeleton, read the calibration tokens."""
        return self._guard(self._setup)[1]

    def run(
        self, stage: Stage, unit: Unit, microbatch: int, origin: Unit | None, arriving: Activation | None
    ) -> tuple[Any, Receipt]:
        """One microbatch of a visit. `arriving` is what unit `origin` put out.

        When that is not the unit this one follows, its input is in the store: the pass goes on after a stop.
        """
        follows = origin is not None and isinstance(unit, int) and origin == self._before(stage, unit)
        return self._guard(lambda: self._run(stage, unit, microbatch, arriving if follows else None))

    def _before(self, stage: Stage, block: int) -> Unit:
        """The unit whose output a block reads in this pass."""
        if stage is Stage.FORWARD:
            return "entry" if block == 0 else block - 1
        return "exit" if block == len(self.runner.layout.blocks) - 1 else block + 1

    def finish(self, stage: Stage, unit: Unit) -> Receipt:
        """Encode or price, commit the record, let go of the unit."""
        return self._guard(lambda: self._finish(stage, unit))[1]

    def _guard(self, call: Callable[[], tuple[Any, dict[str, Any]]]) -> tuple[Any, Receipt]:
        started = time.perf_counter()
        result: Any = None
        facts: dict[str, Any] = {}
        failure = None
        try:
            result, facts = call()
        except PrismaquantError as error:
            failure = Failure(kind=type(error).__name__, message=str(error), exit_code=error.exit_code)
        return result, Receipt(
            worker=self.spec.name,
            seconds=time.perf_counter() - started,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            facts=facts,
            failure=failure,
        )

    def _setup(self) -> tuple[None, dict[str, Any]]:
        config = self.spec.config
        torch.set_num_threads(config.cluster.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.store = Store(config.store.run, create=False)
        checkpoint = Checkpoint(Store(self.spec.source, create=False))
        self.runner = ModelRunner(checkpoint, dtype=getattr(torch, config.model.dtype), device=self.device)
        self.calibration = read_calibration(self.store)
        gptq = config.rounding.gptq
        search = config.rounding.scale_search
        self.rounding = Rounding(
            scale_search=ScaleSearch(grid=search.grid, span=search.span),
            gptq=Gptq(damping=gptq.damping) if gptq else None,
        )
        return None, {"pid": os.getpid(), "device": str(self.device)}

    # One microbatch -------------------------------------------------------------------------------------------

    def _run(
        self, stage: Stage, unit: Unit, microbatch: int, arriving: Activation | None
    ) -> tuple[Activation, dict[str, Any]]:
        visit = self.visits.get((stage, unit))
        if visit is None:
            visit = self.visits[stage, unit] = self._begin(stage, unit)
        rows = self.calibration.microbatches(self.spec.config.calibration.microbatch)[microbatch]
        if stage is Stage.FORWARD:
            leaving = self._forward(visit, unit, rows, microbatch, arriving)
        else:
            leaving = self._backward(visit, unit, rows, microbatch, arriving)
        name = boundary_name(microbatch)
        key = f"{stage}/{unit_key(unit)}/{visit.attempt}/{name}.safetensors"
        visit.artifacts[name] = write_tensors(self.store, key, {"boundary": leaving.cpu()})
        return to_wire(leaving), {"tokens": leaving.shape[0] * leaving.shape[1]}

    def _begin(self, stage: Stage, unit: Unit) -> Visit:
        formats = self.spec.config.formats
        core: ForwardVisit | BackwardVisit | None = None
        if isinstance(unit, int) and stage is Stage.FORWARD:
            core = ForwardVisit(self.runner, unit, formats, self.rounding)
        elif isinstance(unit, int):
            core = BackwardVisit(self.runner, unit, formats, self._candidates(unit))
        visit = Visit(core, new_attempt())
        if not isinstance(unit, int):
            visit.resident.enter_context(self.runner.entry() if unit == "entry" else self.runner.exit())
        return visit

    def _candidates(self, unit: int) -> dict[FormatName, dict[str, Tensor]]:
        record = self._record(Stage.FORWARD, unit)
        return {
            FormatName(name): read_tensors(self.store, artifact)
            for name, artifact in record.artifacts.items()
            if name in set(FormatName)
        }

    def _forward(self, visit: Visit, unit: Unit, rows: slice, microbatch: int, arriving: Activation | None) -> Tensor:
        if unit == "entry":
            with torch.no_grad():
                return self.runner.embed(self.calibration.tokens[rows])
        assert isinstance(unit, int)
        assert isinstance(visit.core, ForwardVisit)
        hidden = self._arriving(arriving, Stage.FORWARD, self._before(Stage.FORWARD, unit), microbatch)
        return visit.core.run(hidden, self.calibration.holdout[rows])

    def _backward(self, visit: Visit, unit: Unit, rows: slice, microbatch: int, arriving: Activation | None) -> Tensor:
        if unit == "exit":
            config = self.spec.config.calibration
            hidden = self._arriving(None, Stage.FORWARD, len(self.runner.layout.blocks) - 1, microbatch)
            gradient, loss = exit_gradient(
                self.runner,
                hidden,
                self.calibration.tokens[rows],
                labels=config.labels,
                seed=config.seed,
                first_sequence=rows.start,
            )
            visit.loss += loss
            return gradient
        assert isinstance(unit, int)
        assert isinstance(visit.core, BackwardVisit)
        gradient = self._arriving(arriving, Stage.BACKWARD, self._before(Stage.BACKWARD, unit), microbatch)
        hidden = self._arriving(None, Stage.FORWARD, self._before(Stage.FORWARD, unit), microbatch)
        return visit.core.run(hidden, gradient)

    def _arriving(self, arriving: Activation | None, stage: Stage, origin: Unit, microbatch: int) -> Tensor:
        if arriving is not None:
            return from_wire(arriving).to(self.device)
        artifact = self._record(stage, origin).artifacts[boundary_name(microbatch)]
        return read_tensors(self.store, artifact)["boundary"].to(self.device)

    # The end of a visit ---------------------------------------------------------------------------------------

    def _finish(self, stage: Stage, unit: Unit) -> tuple[None, dict[str, Any]]:
        visit = self.visits.pop((stage, unit))
        visit.resident.close()
        directory = f"{stage}/{unit_key(unit)}/{visit.attempt}"
        artifacts = dict(visit.artifacts)
        facts: dict[str, Any] = {}
        if isinstance(visit.core, ForwardVisit):
            candidates = visit.core.finish()
            facts = candidates.figures
            for name, tensors in candidates.tensors.items():
                artifacts[name] = write_tensors(self.store, f"{directory}/{name}.safetensors", tensors)
        elif isinstance(visit.core, BackwardVisit):
            sensitivity = visit.core.finish()
            facts = sensitivity.figures
            vectors = write_tensors(self.store, f"{directory}/vectors.safetensors", sensitivity.vectors)
            artifacts["vectors"] = vectors
        elif unit == "exit":
            facts = {"loss_per_token": visit.loss / self.calibration.tokens.numel()}
        write_record(self.store, record_key(stage, unit), Record(artifacts=artifacts, facts=facts))
        del visit
        release_memory()
        return None, {"bytes": sum(artifact.size for artifact in artifacts.values())}

    def _record(self, stage: Stage, unit: Unit) -> Record:
        record = read_record(self.store, record_key(stage, unit))
        if record is None:
            raise StoreError(f"{self.store.uri}: {record_key(stage, unit)} is missing; run the same command again")
        return record


def read_calibration(store: Store) -> CalibrationSet:
    """The calibration set the driver stored before it started workers."""
    record = read_record(store, "calibration/record.json")
    if record is None:
        raise StoreError(f"{store.uri}: no calibration set is stored; run the same command again")
    tensors = read_tensors(store, record.artifacts["tokens"])
    return CalibrationSet(tokens=tensors["tokens"], holdout=tensors["holdout"], fingerprint=record.facts["fingerprint"])


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps it in pools, and the next block's would come on top."""
    library = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(library), "malloc_trim", None) if library else None
    if trim is not None:
        trim(0)
