"""Typed events of a run: one emitter, many listeners (log, terminal, metrics).

The log is `events.jsonl` in the run store: one JSON object per line, oldest first, over all attempts of the run; what
writes it is `event_log`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from prismaquant_ray.parsing import parse_json
from prismaquant_ray.records import EVENTS, TakenText
from prismaquant_ray.serialization import to_json
from prismaquant_ray.storage.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened; `at` is in seconds since the epoch."""

    at: float = field(default_factory=time.time)
    #: What it is, as the log says it.
    event: str

    def line(self) -> str:
        """Its line of the log; step metrics that are None are left out."""
        return json.dumps({**to_json(self), "at": round(self.at, 3)}, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a worker runs: its process, its device, bytes free on the device and in all on the host.

    `host_free_bytes` is what is free on the host beside a GPU that has a memory of its own.
    """

    version: str
    pid: int
    host: str
    device: str
    free_bytes: int
    host_bytes: int
    host_free_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Figures of a step.

    A microbatch has `tokens` and `hop_bytes` (from another worker), an exit also its `loss` in nats; the end of a shard
    has `read_bytes` and `written_bytes` (from and to the stores).
    """

    tokens: int | None = None
    hop_bytes: int | None = None
    loss: float | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlacedRepository:
    """A written repository: bytes of all files, bits per quantizable parameter, seconds it took to write."""

    uri: str
    target: str
    bpp: float
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunBegan(Event):
    """A driver begins; `workers` are as configured."""

    event: Literal["begin"] = "begin"
    workers: int | Literal["auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded(Event):
    """A driver ends, `measured` or `stopped`."""

    event: Literal["end"] = "end"
    how: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TextsRead(Event):
    """What a set of sequences was made from, for calibration or evaluation, and the fingerprint of its tokens."""

    event: Literal["texts"] = "texts"
    purpose: str
    length: int
    sources: Sequence[TakenText]
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerReady(Machine, Event):
    """A worker is set up, on a machine."""

    event: Literal["worker"] = "worker"
    worker: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsSized(Event):
    """How many blocks a worker loads at a time, of how many, and why: see `ShardSize`."""

    event: Literal["shards"] = "shards"
    model_blocks: int
    blocks: int
    free_bytes: int
    fitting: int
    wanted: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflighted(Event):
    """A few tokens went through a few blocks, each standing for all of its structure: see `Preflight`."""

    event: Literal["preflight"] = "preflight"
    worker: str
    tried: list[str]
    without_gradient: list[str]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsShrunk(Event):
    """A device ran out of memory; from now on a worker loads at most `blocks` blocks at a time."""

    event: Literal["shrunk"] = "shrunk"
    blocks: int
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PassBegan(Event):
    """A pass begins; counts of shards, units, producing units, microbatches and steps."""

    event: Literal["pass"] = "pass"
    stage: str
    shards: int
    units: int
    produced: int
    microbatches: int
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone(StepMetrics, Event):
    """A worker has run a microbatch of a shard, or has finished it (`microbatch` is None).

    `started` is in seconds since the epoch, on the worker's clock. Every one of `units` units has seen the `tokens`.
    """

    event: Literal["step"] = "step"
    stage: str
    shard: str
    units: int
    microbatch: int | None
    worker: str
    started: float
    seconds: float
    peak_bytes: int

    @property
    def ended(self) -> float:
        """When the call ended, on the worker's clock."""
        return self.started + self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSteps(StepMetrics, Event):
    """The `steps` of a worker on a shard in one, which the log has in their place once the worker is done with it.

    `at` and `microbatch` are those of the last one: None once the shard is finished. `started` to `ended` is when it
    was held, `seconds` what calls took, of them the first one, the median of the microbatches behind it, and the
    finish. Between the last microbatch and the finish lies a `gap` that waits for the driver only. `loss` is a mean.
    """

    event: Literal["steps"] = "steps"
    stage: str
    shard: str
    units: int
    microbatch: int | None
    worker: str
    steps: int
    started: float
    ended: float
    seconds: float
    peak_bytes: int
    first: float
    median: float | None = None
    finish: float | None = None
    gap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardDone(Event):
    """A shard is finished; `units` are their keys, `left` counts the shards of the pass that are not finished."""

    event: Literal["shard"] = "shard"
    stage: str
    shard: str
    units: Sequence[str]
    worker: str
    produced: int
    left: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLost(Event):
    """A worker is gone; `shard` is the one that it held."""

    event: Literal["lost"] = "lost"
    worker: str
    cause: str
    shard: str | None
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardYielded(Event):
    """A worker yielded its shard, so that a blocking one can run."""

    event: Literal["yielded"] = "yielded"
    worker: str
    shard: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectRepaired(Event):
    """A stored object is damaged; the records in `forgotten` are made again."""

    event: Literal["repair"] = "repair"
    key: str
    message: str
    forgotten: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryWritten(PlacedRepository, Event):
    """A verified repository is in place."""

    event: Literal["repository"] = "repository"


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice(Event):
    """A sentence for people; not kept."""

    event: Literal["notice"] = "notice"
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting(Event):
    """Nothing has come for a while: what is waited for. Kept until the next event."""

    event: Literal["waiting"] = "waiting"
    message: str


# What the log has.
_LOGGED = (
    RunBegan
    | RunEnded
    | TextsRead
    | WorkerReady
    | ShardsSized
    | Preflighted
    | ShardsShrunk
    | PassBegan
    | StepDone
    | ShardSteps
    | ShardDone
    | WorkerLost
    | ShardYielded
    | ObjectRepaired
    | RepositoryWritten
    | Waiting
)
_READER: TypeAdapter[Event] = TypeAdapter(Annotated[_LOGGED, Field(discriminator="event")])

#: Called with every event, in order.
Listener = Callable[[Event], None]


class Events:
    """Hands events to listeners."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    @contextmanager
    def listening(self, *listeners: Listener) -> Iterator[None]:
        """More listeners, inside the with-block."""
        before = self.listeners
        self.listeners = [*before, *listeners]
        try:
            yield
        finally:
            self.listeners = before

    def __call__(self, event: Event) -> None:
        """Tell every listener."""
        for listener in self.listeners:
            listener(event)


def read_events(store: Store) -> list[Event]:
    """The log of a run, oldest first; empty before anything happened. Lines that cannot be read are left out."""
    try:
        text = store.get(EVENTS)
    except KeyError:
        return []
    return [event for line in text.splitlines() if (event := _parse(line)) is not None]


def _parse(line: bytes) -> Event | None:
    """The event of a line; None where it is cut or is something else: it is only a log."""
    try:
        return _READER.validate_python(parse_json(line, finite=True))
    except ValueError:
        return None
