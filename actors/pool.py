"""Workers as Ray actors. With `actors.connect` and `actors.metrics`, the only module that talks to Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.connect import Capacity, capacity
from actors.messages import Receipt, WorkerSpec
from actors.protocol import Call, CallKind, Reply
from actors.schedule.recovery import Cause
from actors.schedule.units import Shard
from actors.transfer import Activation
from actors.worker import ShardWorker
from prismaquant_ray.errors import ResourceError, WorkerBugError

# glibc settings. Arenas: by default every thread gets its own and cannot reuse memory that a storage thread freed; with
# sixteen arenas a worker's memory grows with the number of blocks, with two it does not. Allocations above 16 MiB are
# mapped directly, so that small neighbours cannot pin them (glibc would raise that threshold to 32 MiB, and logits are
# as large). Free memory above 128 MiB is returned at once, the rest when a shard closes. Huge pages where available.
WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(2**24),
    "MALLOC_TRIM_THRESHOLD_": str(2**27),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # Memory of a GPU that one block leaves in pieces serves the next one.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # cuBLAS adds in the same order every time only with workspaces of a fixed size.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


# Seconds in which a worker must have fetched a boundary from the node of another one. It is read from the store then.
FETCH_SECONDS = 20.0


class RayWorker(ShardWorker):
    """A worker that fetches what another one put out by itself.

    As an argument Ray would fetch it before the call, without a limit: nobody could tell that from work.
    """

    def fetch_and_run(
        self, shard: Shard, microbatch: int, arriving: list[Any]
    ) -> tuple[Activation | None, Receipt | None]:
        """`run` with the output behind the reference in `arriving`; neither output nor receipt when it is not had."""
        import ray
        from ray.exceptions import GetTimeoutError, ObjectLostError

        try:
            activation = ray.get(arriving[0], timeout=FETCH_SECONDS)
        except (GetTimeoutError, ObjectLostError):
            return None, None
        return self.run(shard, microbatch, activation)


@dataclass(frozen=True, slots=True)
class Sent:
    """A call on its way: whose it is, what it does, and what it puts out."""

    worker: str
    what: str
    output: Any = None


class RayWorkers:
    """Actors of one run. They live as long as the driver and are lost with it."""

    def __init__(self, spec: WorkerSpec) -> None:
        import ray

        cluster = spec.config.cluster
        self.spec = spec
        self.capacity: Capacity = capacity(cluster)
        options: dict[str, Any] = {
            "num_cpus": 1 if self.capacity.gpu else cluster.threads,
            "num_gpus": 1 if self.capacity.gpu else 0,
            "scheduling_strategy": "SPREAD" if cluster.placement == "spread" else "DEFAULT",
            # No restarts: the driver must see why a worker died.
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": WORKER_ENVIRONMENT},
        }
        if cluster.labels:
            options["label_selector"] = dict(cluster.labels)
        if cluster.memory != "auto" and not self.capacity.gpu:
            options["memory"] = cluster.memory
        self._class = ray.remote(RayWorker).options(**options)
        self._actors: dict[str, Any] = {}
        self._flying: dict[Any, Sent] = {}

    def start(self, worker: str) -> None:
        """Ask the cluster for an actor."""
        actor = self._class.remote()
        self._actors[worker] = actor
        self._flying[actor.hello.options(name=f"prismaquant hello {worker}").remote()] = Sent(worker, "hello")

    def submit(self, worker: str, call: Call) -> None:
        """Send a call under a name that dashboards and process lists show."""
        import ray

        actor, what, output = self._actors[worker], str(call), None
        if call.kind is CallKind.SETUP:
            reference = actor.setup.remote(replace(self.spec, name=worker, gpu=self.capacity.gpu))
        elif call.kind is CallKind.DIAGNOSE:
            reference = actor.diagnose.remote(replace(self.spec, name=worker, gpu=self.capacity.gpu))
        elif call.kind is CallKind.PREFLIGHT:
            reference = actor.preflight.remote()
        elif call.kind is CallKind.DROP:
            reference = actor.drop.remote()
        else:
            assert call.shard is not None
            name = f"prismaquant {call.shard.stage} {call.kind} {call.shard.name}"
            if call.kind is CallKind.FINISH:
                reference = actor.finish.options(name=name).remote(call.shard, call.following)
            elif call.kind is CallKind.PREFETCH:
                reference = actor.prefetch.options(name=name).remote(call.shard)
            else:
                fetched = isinstance(call.arriving, ray.ObjectRef)
                method = actor.fetch_and_run if fetched else actor.run
                run = method.options(name=name, num_returns=2)
                # Inside a list, a reference stays one.
                arriving = [call.arriving] if fetched else call.arriving
                output, reference = run.remote(call.shard, call.microbatch, arriving)
        self._flying[reference] = Sent(worker, what, output)

    def wait(self, timeout: float) -> Sequence[Reply]:
        """Every reply there is, or the first one to arrive."""
        import ray

        if not self._flying:
            return []
        references = list(self._flying)
        done, _ = ray.wait(references, num_returns=1, timeout=timeout)
        if done:
            done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [self._reply(reference) for reference in done]

    def _reply(self, reference: Any) -> Reply:
        import ray
        from ray.exceptions import (
            NodeDiedError,
            OutOfDiskError,
            OutOfMemoryError,
            RayActorError,
            RayTaskError,
            RuntimeEnvSetupError,
            WorkerCrashedError,
        )

        flight = self._flying.pop(reference)
        worker = flight.worker
        try:
            receipt: Receipt | None = ray.get(reference)
        except RayTaskError as error:
            _refuse_unimportable(str(error))
            raise WorkerBugError(type(error.cause).__name__, str(error.cause), f"{flight.what} on {worker}") from error
        except (OutOfDiskError, RuntimeEnvSetupError) as error:
            raise ResourceError(f"Ray on the node of {worker}: {_first_line(error)}") from error
        except (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
            _refuse_unimportable(str(error))
            self._forget(worker)
            _check_own_node()
            return Reply(worker=worker, lost=(_cause(error), _first_line(error)))
        return Reply(worker=worker, receipt=receipt, output=flight.output)

    def stop(self, worker: str) -> None:
        """Kill an actor."""
        self._flying = {reference: entry for reference, entry in self._flying.items() if entry.worker != worker}
        self._forget(worker)

    def _forget(self, worker: str) -> None:
        import ray

        # An actor that is only unreachable may come back and must not go on writing.
        ray.kill(self._actors.pop(worker))

    def describe(self) -> str:
        """The cluster's current resources."""
        return str(capacity(self.spec.config.cluster))

    def close(self) -> None:
        """End the actors."""
        for worker in list(self._actors):
            self.stop(worker)


def _check_own_node() -> None:
    """ResourceError when the cluster has given up the driver's own node: it then ends all workers of the driver."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == own and not node["Alive"]:
            raise ResourceError(
                f"the driver's own Ray node, {node['NodeManagerHostname']}, is lost to the cluster, and all workers "
                "with it: it was unreachable for too long, or its raylet has died; start it again, then run the same "
                "command again to continue"
            )


def _cause(error: Exception) -> Cause:
    from ray.exceptions import OutOfMemoryError

    text = str(error)
    if isinstance(error, OutOfMemoryError):
        return Cause.MEMORY
    # Ray has one error for both; its text says which: "The actor died because its node has died", "node was …".
    return Cause.NODE if "node has died" in text or "node was terminated" in text else Cause.PROCESS


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _refuse_unimportable(text: str) -> None:
    """ResourceError when a worker could not import this project: it would fail on every node of that image."""
    for package in ("actors", "prismaquant_ray"):
        if f"No module named '{package}" in text:
            raise ResourceError(
                f"a worker cannot import {package}: its node has no prismaquant-ray. Install it in the image, or "
                "submit the job with --working-dir and this checkout"
            )
