"""Opening the workers of a run: Ray actors, or plain objects of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from actors.messages import WorkerSpec
from actors.protocol import Workers
from prismaquant_ray.events import Listener


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerPool:
    """Workers, how many of them to ask for, and workers per node, which is known once the first one has reported."""

    workers: Workers
    wanted: int
    sharing: Callable[[], int]
    listeners: tuple[Listener, ...] = ()


#: Opens the workers of a run, given the most of them that could be busy.
OpenWorkers = Callable[[WorkerSpec, int], AbstractContextManager[WorkerPool]]


@contextmanager
def ray_workers(spec: WorkerSpec, at_most: int) -> Iterator[WorkerPool]:
    """Workers as actors on the configured cluster."""
    from actors.connect import capacity, connected, worker_count
    from actors.metrics import Metrics
    from actors.pool import RayWorkers

    with connected(spec.config.cluster):
        wanted = worker_count(spec.config.cluster, at_most)
        workers = RayWorkers(spec)
        try:
            yield WorkerPool(
                workers=workers,
                wanted=wanted,
                sharing=lambda: min(wanted, capacity(spec.config.cluster).sharing),
                listeners=(Metrics(spec.run),),
            )
        finally:
            workers.close()
