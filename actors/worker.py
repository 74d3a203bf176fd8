"""The actor that holds shards while they are run. It calls the core, commits to the store, returns receipts.

A plain class: the driver wraps it with `ray.remote`, tests call it directly.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import resource
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch.utils import deterministic

from actors.block_tasks import BackwardTask, ForwardTask, HeadBackwardTask, HeadTask
from actors.boundary_tasks import EntryTask, ExitTask, PixelsTask
from actors.context import WorkerContext
from actors.diagnosis import WorkerDiagnosis, diagnose
from actors.evaluation_tasks import (
    BlocksEvaluation,
    DraftEvaluation,
    EntryEvaluation,
    ExitEvaluation,
    PixelsEvaluation,
)
from actors.memory import free_memory, planned_of
from actors.messages import Failure, Receipt, WorkerSpec
from actors.schedule.run_store import RunStore
from actors.schedule.units import Exit, Shard, Stage
from actors.shard_task import Attempt, ShardTask, UnitTask
from actors.stored_blocks import StoredBlocks
from actors.transfer import Activation
from prismaquant_ray import __version__
from prismaquant_ray.calibration.stored import read_calibration
from prismaquant_ray.compressed.view import RepositoryView
from prismaquant_ray.config import Config
from prismaquant_ray.copies import has_own_memory
from prismaquant_ray.errors import DeviceMemoryError, PrismaquantError, ResourceError
from prismaquant_ray.evaluation.variants import QuantizedModel, Variants
from prismaquant_ray.events import Machine, StepMetrics
from prismaquant_ray.forward.encode import Rounding
from prismaquant_ray.forward.gptq import Gptq
from prismaquant_ray.forward.scale_search import ScaleSearch
from prismaquant_ray.kernels import check_gpu
from prismaquant_ray.model.layout_builder import scope_of
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.preflight import Preflight, preflight
from prismaquant_ray.records import RUN
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.source.resolve import resolve
from prismaquant_ray.storage.record import Artifact
from prismaquant_ray.storage.store import Store

# Threads that digest and store what a worker makes. Beside a GPU one would be slower than it; a CPU has the work, too.
_STORAGE_THREADS = {"cpu": 1, "cuda": 4}


@dataclass(slots=True, eq=False)
class _Call:
    """A call while it is answered: its output, its metrics, and in the end its receipt."""

    output: Activation | None = None
    machine: Machine | None = None
    metrics: StepMetrics = field(default_factory=StepMetrics)
    preflight: Preflight | None = None
    diagnosis: WorkerDiagnosis | None = None
    receipt: Receipt = field(init=False)


class ShardWorker:
    """Runs shard tasks. The constructor does nothing that can fail; `setup` loads."""

    def __init__(self) -> None:
        self.name = ""
        self.task: ShardTask | None = None
        self.limit: int | None = None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def hello(self) -> Receipt:
        """This process and its machine; takes no argument that another version could misread."""
        with self._answering() as call:
            call.machine = self._machine()
        return call.receipt

    def diagnose(self, spec: WorkerSpec) -> Receipt:
        """What this worker can do; needs no run store."""
        self.name = spec.name
        with self._answering() as call:
            self._set_up_device(spec)
            call.diagnosis = diagnose(
                self._machine(),
                self.device,
                formats=spec.config.formats,
                dtype=getattr(torch, spec.config.model.dtype),
                store=Store(spec.run),
            )
        return call.receipt

    def setup(self, spec: WorkerSpec) -> Receipt:
        """Open the checkpoint and the run store, build the meta model, read the calibration tokens."""
        self.name = spec.name
        with self._answering() as call:
            self._setup(spec)
            call.machine = self._machine()
        return call.receipt

    def preflight(self) -> Receipt:
        """Try a few tokens on a few blocks."""
        with self._answering() as call:
            context = self.context
            call.preflight = preflight(context.runner, context.calibration, context.loss)
        return call.receipt

    def run(
        self, shard: Shard, microbatch: int, arriving: Activation | Artifact | None
    ) -> tuple[Activation | None, Receipt]:
        """One microbatch of a shard; its first one loads the shard.

        `arriving` is the output of the shard's origin or the artifact that holds it; None: look it up in the run store.
        """
        with self._answering(shard) as call:
            if self.task is None or self.task.shard != shard:
                self._close()
                self.task = open_task(self.context, shard)
                self.context.prefetch(None)
            call.output, call.metrics = self.task.run(microbatch, arriving)
        return call.output, call.receipt

    def finish(self, shard: Shard, following: Shard | None = None) -> Receipt:
        """Encode or price, commit the records, drop the shard; `following` is read meanwhile."""
        with self._answering(shard) as call:
            self.context.prefetch(following)
            assert self.task is not None
            assert self.task.shard == shard
            self.task.finish()
            attempt = self.task.attempt
            call.metrics = StepMetrics(read_bytes=attempt.read_bytes, written_bytes=attempt.written_bytes)
            self._close()
        return call.receipt

    def prefetch(self, shard: Shard) -> Receipt:
        """Begin to read a shard that may be the next one."""
        with self._answering() as call:
            self.context.prefetch(shard)
        return call.receipt

    def drop(self) -> Receipt:
        """Drop the shard without a result: another worker will run it."""
        with self._answering() as call:
            self.context.prefetch(None)
            self._close()
        return call.receipt

    @contextmanager
    def _answering(self, shard: Shard | None = None) -> Iterator[_Call]:
        """Time the with-block and make a receipt of it; an error of this project goes into the receipt."""
        started, clock = time.time(), time.perf_counter()
        call = _Call()
        failure = None
        stored: Mapping[int, Artifact] = {}
        try:
            yield call
            if self.task is not None:
                stored = self.task.stored()
            self._check_memory()
        except PrismaquantError as error:
            call.output, failure = None, Failure.of(error)
        except torch.OutOfMemoryError as error:
            call.output, failure = None, Failure.of(self._no_memory(error, shard))
        call.receipt = Receipt(
            worker=self.name,
            started=started,
            seconds=time.perf_counter() - clock,
            peak_bytes=peak_bytes(),
            machine=call.machine,
            metrics=call.metrics,
            stored=stored,
            failure=failure,
            preflight=call.preflight,
            diagnosis=call.diagnosis,
        )

    def _machine(self) -> Machine:
        cuda, host = self.device.type == "cuda", free_memory()
        device = planned_of(torch.cuda.mem_get_info()[0]) if cuda else host
        apart = has_own_memory(self.device)
        return Machine(
            version=__version__,
            pid=os.getpid(),
            host=socket.gethostname(),
            device=torch.cuda.get_device_name() if cuda else "cpu",
            free_bytes=device if apart else min(device, host),
            host_bytes=int(psutil.virtual_memory().total),
            host_free_bytes=host if apart else None,
        )

    def _set_up_device(self, spec: WorkerSpec) -> None:
        config = spec.config
        if config.cluster.device == "cpu":
            self.device = torch.device("cpu")
        elif spec.gpu and not torch.cuda.is_available():
            raise ResourceError(
                f"{spec.name} has a GPU of {socket.gethostname()}, which torch {torch.__version__} there cannot use; "
                "install a torch that is built for CUDA and a driver that is new enough for it, or set cluster.device: "
                "cpu"
            )
        cuda = self.device.type == "cuda"
        torch.set_num_threads(share_of_cores() if cuda else config.cluster.threads)
        if cuda:
            check_gpu()
            # The same bits every time, but for operations that have no such kernel: the backward pass of attention.
            torch.use_deterministic_algorithms(True, warn_only=True)
            deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        # Sums keep float32: cuDNN's default, and that of split products in BF16, round them to ten bits or to eight.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def _setup(self, spec: WorkerSpec) -> None:
        self._set_up_device(spec)
        config = spec.config
        self.limit = config.cluster.memory if config.cluster.memory != "auto" else None
        store = Store(spec.run, create=False)
        if store.size(RUN) is None:
            raise ResourceError(
                f"store.run {spec.run} on {socket.gethostname()} is not the driver's; on several machines it must be "
                "a directory that they share, or an s3:// or gs:// URI"
            )
        run_store = RunStore(store)
        checkpoint = Checkpoint(resolve(spec.source, spec.revision))
        gptq, search = config.rounding.gptq, config.rounding.scale_search
        runner = self._runner(checkpoint, config)
        self.context = WorkerContext(
            config=config,
            run_store=run_store,
            runner=runner,
            variants=self._variants(runner, spec),
            calibration=read_calibration(store, run=run_store.run),
            rounding=Rounding(
                scale_search=ScaleSearch(grid=search.grid, span=search.span),
                gptq=Gptq(damping=gptq.damping) if gptq else None,
            ),
            threads=ThreadPoolExecutor(_STORAGE_THREADS[self.device.type], thread_name_prefix="store"),
        )

    def _runner(self, checkpoint: TensorSource, config: Config) -> ModelRunner:
        dtype = getattr(torch, config.model.dtype)
        return ModelRunner(checkpoint, dtype=dtype, device=self.device, scope=scope_of(config))

    def _variants(self, source: ModelRunner, spec: WorkerSpec) -> Variants | None:
        if spec.evaluation is None:
            return None
        evaluation = spec.evaluation
        store = evaluation.candidates
        measured = StoredBlocks(RunStore(Store(store, create=False))) if store is not None else None

        repository = None
        if evaluation.repository is not None:
            view = RepositoryView(Store(evaluation.repository, create=False))
            runner = self._runner(view, spec.config)
            attention = source.layout.attention
            repository = QuantizedModel(runner=runner, roundings=view.roundings(), cache=view.cache_scales(attention))
        return Variants(source, evaluation.variants, stored=measured, repository=repository)

    def _close(self) -> None:
        if self.task is not None:
            self.task.close()
            self.task = None
            release_memory()

    def _no_memory(self, error: torch.OutOfMemoryError, shard: Shard | None) -> DeviceMemoryError:
        # The traceback holds what the shard had computed.
        traceback.clear_frames(error.__traceback__)
        self._close()
        torch.cuda.empty_cache()
        first, where = str(error).partition(". ")[0], "" if shard is None else f" for {shard.stage} {shard.name}"
        return DeviceMemoryError(f"{self.name} on {socket.gethostname()} has no memory left{where}: {first}")

    def _check_memory(self) -> None:
        taken = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_bytes()
        if self.limit is not None and taken > self.limit:
            raise ResourceError(
                f"{self.name} took {taken / 1e9:.2f} GB, cluster.memory allows {self.limit / 1e9:.2f}; "
                "lower cluster.blocks_per_shard or calibration.microbatch"
            )


def open_task(context: WorkerContext, shard: Shard) -> ShardTask:
    """Load a shard; blocks first unload the head, which only exits need."""
    if isinstance(shard.units[0], int):
        context.unload_head()
    attempt = Attempt(context, shard)
    return ShardTask(attempt, _evaluation(attempt) if shard.stage is Stage.EVALUATION else _measurement(attempt))


def _measurement(attempt: Attempt) -> UnitTask:
    first, forward = attempt.shard.units[0], attempt.shard.stage is Stage.FORWARD
    if first == "pixels":
        return PixelsTask(attempt)
    if first == "entry":
        return EntryTask(attempt)
    if isinstance(first, Exit):
        return ExitTask(attempt)
    if first in attempt.context.graph.heads:
        return HeadTask(attempt, ForwardTask(attempt) if forward else HeadBackwardTask(attempt))
    return ForwardTask(attempt) if forward else BackwardTask(attempt)


def _evaluation(attempt: Attempt) -> UnitTask:
    first = attempt.shard.units[0]
    if first == "pixels":
        return PixelsEvaluation(attempt)
    if first == "entry":
        return EntryEvaluation(attempt)
    if isinstance(first, Exit):
        return ExitEvaluation(attempt)
    return DraftEvaluation(attempt) if first in attempt.context.graph.heads else BlocksEvaluation(attempt)


def share_of_cores() -> int:
    """CPU cores of this node for each of its GPUs: what a GPU's worker casts, checks and digests with."""
    gpus = sum(1 for _ in Path("/proc/driver/nvidia/gpus").glob("*"))
    return max(1, len(os.sched_getaffinity(0)) // max(1, gpus))


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Give freed memory back to the system: glibc would keep it and allocate the next block on top."""
    library = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(library), "malloc_trim", None) if library else None
    if trim is not None:
        trim(0)
