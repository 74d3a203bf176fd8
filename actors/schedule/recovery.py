"""Decisions after lost workers, as pure functions of the losses; nothing here waits, reads a clock or calls Ray.

Two budgets: nodes of rented clusters are preempted routinely, so many such losses are allowed; but a shard whose
workers keep crashing is a bug or too large, and a few losses end the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """Why a worker is gone."""

    PROCESS = "its process died"
    MEMORY = "its node ran out of memory"
    NODE = "its node is gone"
    TIMEOUT = "it did not answer in time"
    STORAGE = "it cannot reach storage"


@dataclass(frozen=True, kw_only=True, slots=True)
class LostWorker:
    """A lost worker. `shard` is a readable name of the shard it held, None without one. `message` is Ray's."""

    worker: str
    cause: Cause
    shard: str | None
    message: str = ""
    was_ready: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """When to stop replacing workers.

    Each of these ends the run: `per_shard` lost workers of one shard, except by lost nodes; `starting` workers lost in
    a row before they were ready; `nodes` lost nodes in all. Where storage cannot be reached from, workers start in
    vain while others go on: those do not count as long as another worker is ready.
    """

    per_shard: int = 3
    starting: int = 5
    nodes: int = 100

    def verdict(self, losses: Sequence[LostWorker], *, ready: int) -> str | None:
        """Why the run must stop; None to replace the worker and go on.

        Given every loss so far, oldest first, and how many workers are `ready`.
        """
        last = losses[-1]
        same = [loss for loss in losses if loss.shard == last.shard and loss.cause is not Cause.NODE]
        if last.shard is not None and last.cause is not Cause.NODE and len(same) >= self.per_shard:
            return f"shard {last.shard} lost {len(same)} workers, the last because {last.cause}"
        if last.cause is Cause.STORAGE and ready:
            return None
        failed = losses[-self.starting :]
        if len(failed) == self.starting and not any(loss.was_ready for loss in failed):
            return f"{self.starting} workers in a row were lost while they started, the last because {last.cause}"
        if sum(loss.cause is Cause.NODE for loss in losses) >= self.nodes:
            return f"{self.nodes} nodes were lost"
        return None


def yielding(held: Mapping[str, int], blocking: Sequence[int]) -> str | None:
    """The worker that must yield its shard so that the first blocking one can run; None when none should.

    Call it when every worker waits. The holder of the last shard loses least, if that is behind the blocking one.
    """
    if not held or not blocking:
        return None
    worker, shard = max(held.items(), key=lambda entry: entry[1])
    return worker if shard > blocking[0] else None
