"""Running passes on the workers, to fill in the records that the store lacks.

Records of damaged objects are forgotten and planned again; `actors.schedule.shards` finds the least work for that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import ClassVar

from typing_extensions import override

from actors.controller import Controller
from actors.deadlines import Deadlines
from actors.memory_plan import ADVICE, Free, MemoryPlan, shard_size
from actors.messages import WorkerSpec
from actors.schedule.pass_graph import PassGraph
from actors.schedule.run_store import REQUESTS, RunStore
from actors.schedule.shards import droppable_boundaries, pending_shards
from actors.schedule.units import PASSES, Shard, Stage, Unit, unit_of
from jobs.pipeline.measured import read_stored
from jobs.pipeline.workers import OpenWorkers
from prismaquant_ray import records
from prismaquant_ray.errors import DamagedError, DeviceMemoryError, InputError, ResourceError, StoreError
from prismaquant_ray.events import (
    Event,
    Events,
    Machine,
    Notice,
    ObjectRepaired,
    PassBegan,
    ShardDone,
    ShardsShrunk,
    ShardsSized,
)
from prismaquant_ray.formatting import gigabytes
from prismaquant_ray.records import DeviceRecord
from prismaquant_ray.serialization import to_bytes

#: Repairs in a row after which the store is considered unusable.
REPAIRS = 10
# Seconds the first worker may take to start on a cluster that has room for it: it imports torch, on a cold disk.
_FIRST = 180.0


class Passes(ABC):
    """Passes over one store. `check` raises when they must stop, e.g. because the lease is lost."""

    #: In order.
    stages: ClassVar[tuple[Stage, ...]]

    def __init__(
        self,
        *,
        spec: WorkerSpec,
        memory_plan: MemoryPlan,
        graph: PassGraph,
        run_store: RunStore,
        events: Events,
        check: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.memory_plan = memory_plan
        self.graph = graph
        self.run_store = run_store
        self.events = events
        self.check = check
        self._slow = False

    @property
    def needs_preflight(self) -> bool:
        """Whether nothing shows yet that the model runs block by block."""
        return False

    @abstractmethod
    def pending(self, stage: Stage, *, limit: int) -> tuple[Shard, ...]:
        """The shards of a pass that are missing, at most `limit` blocks each."""

    @abstractmethod
    def droppable(self, stage: Stage, finished: Collection[Unit], left: Collection[Unit]) -> list[tuple[Stage, Unit]]:
        """Boundaries no longer needed once the units `finished` of a pass are done; `left` are the unfinished units."""

    def run(self, open_workers: OpenWorkers) -> None:
        """Run missing shards; opens no worker when there are none."""
        if not any(self.pending(stage, limit=1) for stage in self.stages):
            return
        self.events(Notice(message="opening workers"))
        with (
            open_workers(self.spec, min(len(self.graph.every), self.graph.blocks + 1)) as pool,
            self.events.listening(*pool.listeners),
        ):
            cluster = self.spec.config.cluster
            controller = Controller(
                pool.workers,
                self.events,
                wanted=pool.wanted,
                first=max(cluster.wait, _FIRST),
                deadlines=Deadlines(cluster.timeout),
                check=self.check,
                admit=self.admit,
                is_reachable=self._is_reachable,
            )
            first = controller.wait_for_first()
            size = shard_size(
                self.memory_plan,
                self.spec.config,
                workers=pool.wanted,
                free=Free.of(first, pool.sharing()),
            )
            lacking = self.memory_plan.lacking(size.free)
            if lacking is not None:
                raise ResourceError(
                    f"a worker on {first.host} ({first.device}) cannot hold one block at a time: {lacking}; {ADVICE}"
                )
            self.events(
                ShardsSized(
                    model_blocks=self.memory_plan.blocks,
                    blocks=size.blocks,
                    free_bytes=size.free.memory,
                    fitting=size.fitting,
                    wanted=size.wanted,
                )
            )
            if self.needs_preflight:
                controller.preflight()
            self._passes(controller, min(size.blocks, self.graph.blocks))

    def _is_reachable(self) -> bool:
        """Whether the driver can use the run store."""
        try:
            self.run_store.store.check_writable()
        except StoreError:
            return False
        return True

    def _passes(self, controller: Controller, limit: int) -> None:
        repairs = 0
        while repairs < REPAIRS:
            try:
                for stage in self.stages:
                    self._run_pass(controller, stage, self.pending(stage, limit=limit))
            except DamagedError as error:
                self.repair(error)
                repairs += 1
            except DeviceMemoryError as error:
                limit = self._shrunk(limit, error)
            else:
                return
            controller.abandon()
        uri = self.run_store.store.uri
        raise StoreError(f"{uri}: {REPAIRS} objects were damaged in a row; the store cannot be used")

    def _shrunk(self, limit: int, error: DeviceMemoryError) -> int:
        """Half as many blocks at a time as did not fit; shards of any size give the same bytes."""
        if limit == 1:
            planned = gigabytes(self.memory_plan.device.peak(1))
            raise ResourceError(
                f"{error}, with one block at a time, for which {planned} are planned; {ADVICE}"
            ) from error
        self.events(ShardsShrunk(blocks=limit // 2, message=str(error)))
        return limit // 2

    def _run_pass(self, controller: Controller, stage: Stage, shards: tuple[Shard, ...]) -> None:
        if not shards:
            return
        self.events(
            PassBegan(
                stage=str(stage),
                shards=len(shards),
                units=sum(len(shard.units) for shard in shards),
                produced=sum(len(shard.produce) for shard in shards),
                microbatches=len(self.graph.every),
                steps=sum(len(shard.microbatches) + 1 for shard in shards),
            )
        )
        left = {unit for shard in shards for unit in shard.units}
        drops: list[Future[None]] = []

        def finished(event: Event) -> None:
            if isinstance(event, ShardDone):
                units = [unit_of(key) for key in event.units]
                left.difference_update(units)
                drops.append(threads.submit(self._drop, self.droppable(stage, units, left)))

        with ExitStack() as stack:
            # Deleting takes many requests while workers wait for the driver, so threads do it. Stopping cancels them.
            threads = ThreadPoolExecutor(REQUESTS, thread_name_prefix="drop")
            stack.callback(threads.shutdown, cancel_futures=True)
            stack.enter_context(self.events.listening(finished))
            controller.run_pass(shards)
            for drop in drops:
                drop.result()

    def repair(self, error: DamagedError) -> None:
        """Forget the records that name a damaged object, so that it is made again.

        Raises:
            DamagedError: no record names it.
        """
        forgotten = self.run_store.forget(error.key)
        if not forgotten and self.run_store.store.size(error.key) is not None:
            raise error
        self.events(ObjectRepaired(key=error.key, message=str(error), forgotten=forgotten))

    def _drop(self, boundaries: Collection[tuple[Stage, Unit]]) -> None:
        for stage, unit in boundaries:
            self.run_store.drop_boundary(stage, unit)

    def admit(self, worker: Machine) -> None:
        """Raise InputError unless the worker has the kind of device the run began with; others round differently."""
        store = self.run_store.store
        if worker.device != "cpu" and self.spec.config.model.dtype == "float32" and not self._slow:
            self._slow = True
            self.events(
                Notice(
                    message=f"blocks compute in float32 on {worker.device}, several times slower than in bfloat16; "
                    "model.dtype: auto is bfloat16 where the driver has a GPU or cluster.device is gpu"
                )
            )
        if store.create(records.DEVICE, to_bytes(DeviceRecord(device=worker.device))):
            return
        begun = read_stored(store, DeviceRecord, records.DEVICE, made_by="quantize --fresh")
        if begun is not None and begun.device != worker.device:
            raise InputError(
                f"{store.uri} was begun on {begun.device}, a worker on {worker.host} has {worker.device}, which rounds "
                "differently; use nodes of one kind (cluster.device, cluster.labels) or choose another store.run"
            )


class Measurement(Passes):
    """Both passes that measure a model."""

    stages = PASSES

    @property
    @override
    def needs_preflight(self) -> bool:
        return not self.run_store.recorded(PASSES[0]).done

    @override
    def pending(self, stage: Stage, *, limit: int) -> tuple[Shard, ...]:
        forward, backward = (self.run_store.recorded(each) for each in PASSES)
        return pending_shards(self.graph, forward, backward, limit=limit).of(stage)

    @override
    def droppable(self, stage: Stage, finished: Collection[Unit], left: Collection[Unit]) -> list[tuple[Stage, Unit]]:
        return droppable_boundaries(self.graph, finished, left) if stage is Stage.BACKWARD else []
