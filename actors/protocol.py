"""The controller's calls to workers and their replies: the seam between decisions and Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from actors.messages import Receipt
from actors.schedule.recovery import Cause
from actors.schedule.units import Shard


class CallKind(StrEnum):
    """Kinds of calls."""

    HELLO = "hello"
    SETUP = "setup"
    PREFLIGHT = "preflight"
    RUN = "run"
    FINISH = "finish"
    PREFETCH = "prefetch"
    DROP = "drop"
    DIAGNOSE = "diagnose"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request to a worker. `arriving` is an output as `Workers` handed it out, an artifact, or None.

    `following` of a FINISH is the shard that the worker may begin to read meanwhile, as `shard` is of a PREFETCH.
    """

    kind: CallKind
    shard: Shard | None = None
    microbatch: int = 0
    arriving: Any = None
    following: Shard | None = None

    def __str__(self) -> str:
        """What it does, for people."""
        if self.shard is None:
            return str(self.kind)
        step = f", microbatch {self.microbatch + 1}" if self.kind is CallKind.RUN else ""
        return f"{self.shard.stage} {self.kind} {self.shard.name}{step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The result of a call: a receipt (and an output that can be handed to another worker), a loss, or neither.

    Neither means that the call's input could not be read, or not fetched in time, and the worker did nothing.
    """

    worker: str
    receipt: Receipt | None = None
    output: Any = None
    lost: tuple[Cause, str] | None = None


class Workers(Protocol):
    """A cluster as the controller sees it. A worker has at most one call in flight."""

    def start(self, worker: str) -> None:
        """Ask for a worker of this name and send it HELLO; the reply comes when the cluster has room for it."""
        ...

    def submit(self, worker: str, call: Call) -> None:
        """Send a call."""
        ...

    def wait(self, timeout: float) -> Sequence[Reply]:
        """Replies that have arrived, after at most `timeout` seconds; empty when there are none."""
        ...

    def stop(self, worker: str) -> None:
        """End a worker at once; whatever it was doing is not replied to."""
        ...

    def describe(self) -> str:
        """The cluster's resources, for errors about missing ones."""
        ...
