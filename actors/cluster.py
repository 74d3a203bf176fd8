"""The one module that talks to Ray: a cluster to run on, a pool of workers, a pass driven over them."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.messages import Receipt, Stage, Unit, WorkerSpec
from actors.ring import FINISH, Listener, Ring, Step
from actors.shard_worker import ShardWorker
from prismaquant_ray import errors
from prismaquant_ray.config import ClusterConfig
from prismaquant_ray.errors import PrismaquantError, ResourceError

# Activations of a few microbatches; Ray spills to its temporary directory beyond that.
_OBJECT_STORE_BYTES = 512 * 2**20
# glibc gives every thread a heap of its own, and what a storage thread freed in one block is not there for the
# next: with sixteen heaps a worker's memory grows with the number of blocks, with two it does not.
WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}


@contextmanager
def open_pool(spec: WorkerSpec, at_most: int) -> Iterator[Pool]:
    """A pool of workers on the configured cluster; more than `at_most` could never be busy."""
    with connected(spec.config.cluster) as workers:
        pool = Pool(spec, min(workers, at_most))
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def connected(config: ClusterConfig) -> Iterator[int]:
    """Join or start Ray; yields the number of workers to use.

    A Ray started here has a private temporary directory, a private token that no file holds, and a loopback
    address, so that it neither disturbs nor joins another Ray on the machine. It ends with the with-block.
    """
    with _joined(config) if joins(config) else _started(config):
        yield _worker_count(config)


def joins(config: ClusterConfig) -> bool:
    """Whether a run goes to a Ray that is there already, rather than to one it starts on this machine."""
    return config.address not in ("auto", "local") or (config.address == "auto" and "RAY_ADDRESS" in os.environ)


@contextmanager
def _joined(config: ClusterConfig) -> Iterator[None]:
    address = os.environ["RAY_ADDRESS"] if config.address == "auto" else config.address
    _check_answers(address)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", namespace="prismaquant")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(f"Ray at {address} refuses: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """ResourceError unless somebody listens at host:port; Ray itself would try for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        raise ResourceError(f"cluster.address {address} is not host:port")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ResourceError(f"no Ray answers at {address} ({error}); check cluster.address") from error


@functools.cache
def _token() -> str:
    """One a process: Ray's client keeps the first token it sees."""
    return secrets.token_hex(32)


@contextmanager
def _started(config: ClusterConfig) -> Iterator[None]:
    # Before Ray is imported: without a mode it would write ~/.ray/auth_token and change how other Rays start.
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    saved = {key: os.environ.get(key) for key in ours}
    os.environ.update(ours)
    import ray

    # Unix socket paths are limited to 107 bytes, so not below a user's TMPDIR.
    directory = tempfile.mkdtemp(prefix="pq", dir="/tmp")
    cpus = config.threads * config.workers if config.workers != "auto" else os.cpu_count()
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            namespace="prismaquant",
            object_store_memory=_OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.2",
            _temp_dir=directory,
        )
        yield
    finally:
        ray.shutdown()
        _remove(directory)
        for key, value in saved.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def _remove(directory: str) -> None:
    """Delete Ray's directory; its last processes may still write logs for a moment after shutdown."""
    for _ in range(50):
        shutil.rmtree(directory, ignore_errors=True)
        if not Path(directory).exists():
            return
        time.sleep(0.1)


def _worker_count(config: ClusterConfig) -> int:
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if config.workers == "auto":
        return gpus or max(1, cpus // config.threads)
    if not gpus and config.workers * config.threads > cpus:
        raise ResourceError(
            f"{config.workers} workers of {config.threads} threads were asked for; the cluster has {cpus} CPUs. "
            "Lower cluster.workers or cluster.threads"
        )
    return config.workers


class Pool:
    """Workers of one run. They live as long as the pool and are lost with the driver."""

    def __init__(self, spec: WorkerSpec, workers: int) -> None:
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        # No restarts: the driver must see why a worker died.
        actor = ray.remote(ShardWorker).options(
            num_cpus=spec.config.cluster.threads,
            num_gpus=1 if gpus else 0,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
        )
        self.workers = [actor.remote(replace(spec, name=f"worker-{index}")) for index in range(workers)]
        self.peak_bytes = 0
        self.pids: list[int] = []
        for receipt in _collect([worker.setup.remote() for worker in self.workers]):
            self._accept(receipt)
            self.pids.append(receipt.facts["pid"])

    def run_pass(self, stage: Stage, units: Sequence[Unit], microbatches: int, listener: Listener) -> None:
        """Drive one pass over units in order; the first unit reads its input from the store.

        Raises the error a worker reports, or ResourceError when a worker dies.
        """
        import ray

        ring = Ring(visits=len(units), microbatches=microbatches, workers=len(self.workers))
        flying: dict[Any, tuple[int, Step]] = {}
        idle = set(range(len(self.workers)))
        leaving: dict[Step, Any] = {}
        while not ring.finished:
            for worker in sorted(idle):
                step = ring.next(worker)
                if step is None:
                    continue
                idle.discard(worker)
                flying[self._submit(worker, stage, units, step, leaving)] = worker, step
            (reference,), _ = ray.wait(list(flying), num_returns=1)
            worker, step = flying.pop(reference)
            receipt = _collect([reference])[0]
            self._accept(receipt)
            leaving.pop(Step(step.visit - 1, step.microbatch), None)
            ring.done(step)
            idle.add(worker)
            listener(stage, units[step.visit], step, receipt)

    def _submit(self, worker: int, stage: Stage, units: Sequence[Unit], step: Step, leaving: dict[Step, Any]) -> Any:
        handle, unit = self.workers[worker], units[step.visit]
        if step.microbatch == FINISH:
            return handle.finish.remote(stage, unit)
        arriving = leaving.get(Step(step.visit - 1, step.microbatch))
        origin = units[step.visit - 1] if step.visit else None
        run = handle.run.options(num_returns=2)
        activation, receipt = run.remote(stage, unit, step.microbatch, origin, arriving)
        leaving[step] = activation
        return receipt

    def _accept(self, receipt: Receipt) -> None:
        self.peak_bytes = max(self.peak_bytes, receipt.peak_bytes)
        if receipt.failure is not None:
            kind = getattr(errors, receipt.failure.kind, PrismaquantError)
            raise kind(receipt.failure.message)

    def close(self) -> None:
        """End the workers."""
        import ray

        for worker in self.workers:
            ray.kill(worker)


def _collect(references: Sequence[Any]) -> list[Receipt]:
    import ray
    from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

    try:
        receipts: list[Receipt] = ray.get(list(references))
    except (ActorDiedError, ActorUnavailableError, OutOfMemoryError) as error:
        first = str(error).strip().splitlines()[0]
        raise ResourceError(f"a worker died ({first}); run the same command again to continue") from error
    return receipts
