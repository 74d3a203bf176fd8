"""`doctor`: a cluster tried before a job: devices, kernels, storage, memory, and how long the job would take on it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.diagnosis import PLACE, WorkerDiagnosis
from actors.memory_plan import ADVICE, Free, MemoryPlan, shard_size
from actors.protocol import Call, CallKind, Reply
from jobs.pipeline import checks, sources
from jobs.pipeline.estimate import StageTime, estimate
from jobs.pipeline.run import Run
from jobs.pipeline.workers import OpenWorkers, WorkerPool, ray_workers
from prismaquant_ray import __version__
from prismaquant_ray.config import Config
from prismaquant_ray.device_checks import Check
from prismaquant_ray.errors import ResourceError
from prismaquant_ray.formatting import gigabytes

# Seconds that a diagnosis may take, when workers are there.
_PATIENCE = 120.0
# Seconds that workers may take to start on a cluster that has room for them.
_START = 60.0
_LOST = "see the worker's log in Ray's dashboard, and whether its node is alive"


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """A worker, with the checks of it that need the plan; or why it could not be examined."""

    worker: str
    diagnosis: WorkerDiagnosis | None
    checks: Sequence[Check]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Every worker, and the time of the job by stage; no time where a worker could not be examined."""

    dtype: str
    workers: list[Examined]
    blocks_per_shard: int
    stages: list[StageTime]
    seconds: float

    @property
    def failed(self) -> list[tuple[str, Check]]:
        """Checks that failed, with the worker."""
        return [(each.worker, check) for each in self.workers for check in each.checks if not check.passed]

    @property
    def exit_code(self) -> int:
        """0, or 3 where something failed."""
        return ResourceError.exit_code if self.failed else 0


def doctor(config: Config, *, open_workers: OpenWorkers = ray_workers) -> Diagnosis:
    """Try the workers that a run would have. Leaves nothing behind.

    Raises:
        InputError: the configuration cannot be used.
        ResourceError: there is no cluster, or no worker of it starts.
        StoreError: the run store's place cannot be written to.
    """
    begun = time.monotonic()
    checks.check_stores(config)
    run = Run(config, weights=False)
    config, plan = run.config, run.memory_plan
    spec = sources.worker_spec(config, run.source, config.store.run)
    with _leaving_nothing(config.store.run), open_workers(spec, len(run.layout.blocks) + 1) as pool:
        found = _examine(pool, wait=max(config.cluster.wait, _START))
        sharing = pool.sharing()
    workers = [_examined(name, result, plan, sharing) for name, result in found.items()]
    diagnoses = [each.diagnosis for each in workers if each.diagnosis is not None]
    sizes = [
        shard_size(plan, config, workers=len(found), free=Free.of(each.machine, sharing)).blocks for each in diagnoses
    ]
    blocks = max(1, min(sizes, default=1))
    rates = [each.rates for each in diagnoses]
    return Diagnosis(
        dtype=config.model.dtype,
        workers=workers,
        blocks_per_shard=blocks,
        stages=estimate(run.layout, config, plan, rates, blocks_per_shard=blocks) if rates else [],
        seconds=time.monotonic() - begun,
    )


@contextmanager
def _leaving_nothing(location: Path | str) -> Iterator[None]:
    """Directories that trying a local run store makes are removed again."""
    existed = isinstance(location, str) or location.exists()
    try:
        yield
    finally:
        if not isinstance(location, str):
            shutil.rmtree(location / PLACE if existed else location, ignore_errors=True)


def _examine(pool: WorkerPool, *, wait: float) -> dict[str, WorkerDiagnosis | Check]:
    """What every worker says about itself, by name; ResourceError when none starts in `wait` seconds."""
    names = [f"worker-{number}" for number in range(pool.wanted)]
    for name in names:
        pool.workers.start(name)
    found: dict[str, WorkerDiagnosis | Check] = {}
    started: set[str] = set()
    limit = time.monotonic() + wait
    while len(found) < len(names) and time.monotonic() < limit:
        for reply in pool.workers.wait(0.5):
            if reply.receipt is not None and reply.receipt.machine is not None and reply.receipt.failure is None:
                # Others have as long as a diagnosis takes, once one of them is there.
                limit = limit if started else time.monotonic() + _PATIENCE
                started.add(reply.worker)
                pool.workers.submit(reply.worker, Call(kind=CallKind.DIAGNOSE))
            else:
                found[reply.worker] = _answer(reply)
    if not started and not found:
        raise ResourceError(
            f"no worker could be started in {wait:.0f} s; {pool.workers.describe()}. Lower what cluster asks for, add "
            "nodes, or set cluster.wait for nodes that an autoscaler brings"
        )
    late = Check(name="worker", passed=False, found=f"no answer in {_PATIENCE:.0f} s", advice=_LOST)
    return {name: found.get(name, late) for name in names}


def _answer(reply: Reply) -> WorkerDiagnosis | Check:
    receipt = reply.receipt
    if receipt is not None and receipt.diagnosis is not None:
        return receipt.diagnosis
    if receipt is not None and receipt.failure is not None:
        return Check(name="worker", passed=False, found=receipt.failure.message)
    lost = "its process ended" if reply.lost is None else reply.lost[1]
    return Check(name="worker", passed=False, found=lost, advice=_LOST)


def _examined(name: str, result: WorkerDiagnosis | Check, plan: MemoryPlan, sharing: int) -> Examined:
    if isinstance(result, Check):
        return Examined(worker=name, diagnosis=None, checks=[result])
    machine, free = result.machine, Free.of(result.machine, sharing)
    own = [
        Check(
            name="version",
            passed=machine.version == __version__,
            found=f"prismaquant-ray {machine.version}",
            advice=f"the driver has {__version__}: use the same image everywhere",
        ),
        Check(
            name="memory",
            passed=plan.lacking(free) is None,
            found="one block at a time takes "
            + ", ".join(
                f"{gigabytes(room.peak(1))} of {gigabytes(have)} of {name}"
                for name, (room, have) in plan.rooms(free).items()
            ),
            advice=ADVICE,
        ),
    ]
    return Examined(worker=name, diagnosis=result, checks=[*own, *result.checks])
