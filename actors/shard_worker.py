"""The actor that holds shards while they are visited. It calls the core, commits to the store, returns receipts.

A plain class: the driver wraps it with `ray.remote`, tests call it directly.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import resource
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch
from torch import Tensor

from actors.block_visits import BackwardLeaf, BackwardShard, ForwardLeaf, ForwardShard
from actors.calibration import read_calibration
from actors.evaluation_visits import (
    BlocksSideBySide,
    DraftSideBySide,
    EntrySideBySide,
    ExitSideBySide,
    PixelsSideBySide,
)
from actors.gates import EntryVisit, ExitVisit, PixelsVisit
from actors.ledger import Ledger
from actors.memory import free_memory
from actors.messages import Activation, Exit, Failure, Receipt, Shard, Stage, WorkerSpec
from actors.visit import Visit, Workshop
from prismaquant_ray import __version__
from prismaquant_ray.checkpoint.reader import Checkpoint
from prismaquant_ray.config import Config
from prismaquant_ray.errors import PrismaquantError, ResourceError
from prismaquant_ray.evaluation.repository import RepositoryView
from prismaquant_ray.evaluation.variants import Repository, Variants
from prismaquant_ray.formats import FormatName
from prismaquant_ray.models.inspect import scope_of
from prismaquant_ray.models.runner import ModelRunner
from prismaquant_ray.models.source import resolve
from prismaquant_ray.rounding.encode import Rounding
from prismaquant_ray.rounding.gptq import Gptq
from prismaquant_ray.rounding.scale_search import ScaleSearch
from prismaquant_ray.storage.record import Artifact, read_tensors
from prismaquant_ray.storage.store import Store


class ShardWorker:
    """Runs visits. The constructor does nothing that can fail; `setup` loads."""

    def __init__(self) -> None:
        self.name = ""
        self.visit: Visit | None = None
        self.limit: int | None = None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def hello(self) -> Receipt:
        """What this process is and has; takes no argument that another version could misread."""
        return self._guard(lambda: (None, self._facts()))[1]

    def setup(self, spec: WorkerSpec) -> Receipt:
        """Open the checkpoint and the run store, build the skeleton, read the calibration tokens."""
        self.name = spec.name
        return self._guard(lambda: (None, self._setup(spec)))[1]

    def run(
        self, shard: Shard, microbatch: int, arriving: Activation | Artifact | None
    ) -> tuple[Activation | None, Receipt]:
        """One microbatch of a shard; its first one loads the shard.

        `arriving` is what the shard's origin put out, or where that is stored; None when its record says where.
        """
        return self._guard(lambda: self._run(shard, microbatch, arriving))

    def finish(self, shard: Shard, following: Shard | None = None) -> Receipt:
        """Encode or price, commit the records, let go of the shard; `following` is read meanwhile."""
        return self._guard(lambda: (None, self._finish(shard, following)))[1]

    def ahead(self, shard: Shard) -> Receipt:
        """Begin to read a shard that may be the next one."""
        return self._guard(lambda: (None, self._ahead(shard)))[1]

    def drop(self) -> Receipt:
        """Let go of the shard without a result: another worker will run it."""
        return self._guard(lambda: (None, self._drop()))[1]

    def _guard(self, call: Callable[[], tuple[Any, dict[str, Any]]]) -> tuple[Any, Receipt]:
        started, clock = time.time(), time.perf_counter()
        result: Any = None
        facts: dict[str, Any] = {}
        failure = None
        stored: Mapping[int, Artifact] = {}
        try:
            result, facts = call()
            if self.visit is not None:
                stored = self.visit.stored()
            self._check_memory()
        except PrismaquantError as error:
            result, failure = None, Failure.of(error)
        return result, Receipt(
            worker=self.name,
            started=started,
            seconds=time.perf_counter() - clock,
            peak_bytes=peak_bytes(),
            facts=facts,
            stored=stored,
            failure=failure,
        )

    def _facts(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "version": __version__,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "free_bytes": torch.cuda.mem_get_info()[0] if cuda else free_memory(),
            "host_bytes": int(psutil.virtual_memory().total),
        }

    def _setup(self, spec: WorkerSpec) -> dict[str, Any]:
        config = spec.config
        torch.set_num_threads(config.cluster.threads)
        if config.cluster.device == "cpu":
            self.device = torch.device("cpu")
        self.limit = config.cluster.memory if config.cluster.memory != "auto" else None
        store = Store(spec.run, create=False)
        if store.size("run.json") is None:
            raise ResourceError(
                f"store.run {spec.run} on {socket.gethostname()} is not the driver's; on several machines it must be "
                "a directory that they share, or an s3:// or gs:// URI"
            )
        checkpoint = Checkpoint(resolve(spec.source, config.model.revision))
        gptq, search = config.rounding.gptq, config.rounding.scale_search
        runner = self._runner(checkpoint, config)
        self.shop = Workshop(
            config=config,
            ledger=Ledger(store),
            runner=runner,
            variants=self._variants(runner, spec),
            calibration=read_calibration(store),
            rounding=Rounding(
                scale_search=ScaleSearch(grid=search.grid, span=search.span),
                gptq=Gptq(damping=gptq.damping) if gptq else None,
            ),
            thread=ThreadPoolExecutor(1, thread_name_prefix="store"),
        )
        return self._facts()

    def _runner(self, checkpoint: Checkpoint, config: Config) -> ModelRunner:
        dtype = getattr(torch, config.model.dtype)
        return ModelRunner(checkpoint, dtype=dtype, device=self.device, scope=scope_of(config))

    def _variants(self, source: ModelRunner, spec: WorkerSpec) -> Variants | None:
        if spec.evaluation is None:
            return None
        evaluation = spec.evaluation
        measured = Ledger(Store(evaluation.candidates, create=False)) if evaluation.candidates is not None else None

        def candidates(index: int, name: FormatName) -> Mapping[str, Tensor]:
            assert measured is not None
            artifacts = measured.record(Stage.FORWARD, index).artifacts
            return read_tensors(measured.store, artifacts[name])

        repository = None
        if evaluation.repository is not None:
            view = RepositoryView(Store(evaluation.repository, create=False))
            repository = Repository(runner=self._runner(view, spec.config), roundings=view.roundings())
        return Variants(source, evaluation.variants, candidates=candidates, repository=repository)

    def _run(
        self, shard: Shard, microbatch: int, arriving: Activation | Artifact | None
    ) -> tuple[Activation, dict[str, Any]]:
        if self.visit is None or self.visit.shard != shard:
            self._close()
            self.visit = _open(self.shop, shard)
            self.shop.expect(None)
        return self.visit.run(microbatch, arriving)

    def _ahead(self, shard: Shard) -> dict[str, Any]:
        self.shop.expect(shard)
        return {}

    def _finish(self, shard: Shard, following: Shard | None) -> dict[str, Any]:
        self.shop.expect(following)
        visit = self.visit
        assert visit is not None
        assert visit.shard == shard
        visit.finish()
        facts = {"read_bytes": visit.moved["read"], "written_bytes": visit.moved["written"]}
        del visit
        self._close()
        return facts

    def _drop(self) -> dict[str, Any]:
        self.shop.expect(None)
        self._close()
        return {}

    def _close(self) -> None:
        if self.visit is not None:
            self.visit.close()
            self.visit = None
            release_memory()

    def _check_memory(self) -> None:
        taken = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_bytes()
        if self.limit is not None and taken > self.limit:
            raise ResourceError(
                f"{self.name} took {taken / 1e9:.2f} GB, cluster.memory allows {self.limit / 1e9:.2f}; "
                "lower cluster.blocks_per_shard or calibration.microbatch"
            )


def _open(shop: Workshop, shard: Shard) -> Visit:
    """Load a shard; the head, which only exits need, makes room for anything else."""
    if shard.stage is Stage.EVALUATION:
        return _open_side_by_side(shop, shard)
    first, forward = shard.units[0], shard.stage is Stage.FORWARD
    if first == "pixels":
        return PixelsVisit(shop, shard)
    if first == "entry":
        return EntryVisit(shop, shard)
    if isinstance(first, Exit):
        return ExitVisit(shop, shard)
    shop.unload_head()
    if first in shop.course.leaves:
        return ForwardLeaf(shop, shard) if forward else BackwardLeaf(shop, shard)
    return ForwardShard(shop, shard) if forward else BackwardShard(shop, shard)


def _open_side_by_side(shop: Workshop, shard: Shard) -> Visit:
    first = shard.units[0]
    if first == "pixels":
        return PixelsSideBySide(shop, shard)
    if first == "entry":
        return EntrySideBySide(shop, shard)
    if isinstance(first, Exit):
        return ExitSideBySide(shop, shard)
    shop.unload_head()
    return DraftSideBySide(shop, shard) if first in shop.course.leaves else BlocksSideBySide(shop, shard)


def peak_bytes() -> int:
    """The most host memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps it in pools, and the next block's would come on top."""
    library = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(library), "malloc_trim", None) if library else None
    if trim is not None:
        trim(0)
