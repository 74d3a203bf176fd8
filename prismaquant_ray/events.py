"""Typed events of a run: one emitter, many listeners (log, terminal, metrics).

The log is `events.jsonl` in the run store: one JSON object per line, oldest first, over all attempts of the run. Only
the driver that holds the run's lease writes it. Object stores cannot append, so the whole object is rewritten, less
often as it grows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from prismaquant_ray.parsing import parse_json
from prismaquant_ray.records import EVENTS
from prismaquant_ray.serialization import to_json
from prismaquant_ray.storage.store import Store

# Seconds between two puts, and how many more per megabyte of log.
_INTERVAL = 2.0
_INTERVAL_PER_MEGABYTE = 5.0


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


# What the log has.
_LOGGED = (
    RunBegan
    | RunEnded
    | WorkerReady
    | ShardsSized
    | Preflighted
    | ShardsShrunk
    | PassBegan
    | StepDone
    | ShardDone
    | WorkerLost
    | ShardYielded
    | ObjectRepaired
    | RepositoryWritten
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


class EventLog:
    """The log of a run; continues the one that is there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        try:
            lines = store.get(EVENTS).splitlines()
        except KeyError:
            lines = []
        # What cannot be read would be joined to the next event, or be there for good.
        kept = [(line, event) for line in lines if (event := _parse(line)) is not None]
        self._text = bytearray(b"".join(line + b"\n" for line, _ in kept))
        self._written = time.monotonic()
        #: The most memory a worker has taken, over all attempts.
        self.peak_bytes: int = max((step.peak_bytes for step in steps_of(event for _, event in kept)), default=0)

    def __call__(self, event: Event) -> None:
        """Add an event, unless it is a notice; it reaches the store within seconds."""
        if isinstance(event, Notice):
            return
        if isinstance(event, StepDone):
            self.peak_bytes = max(self.peak_bytes, event.peak_bytes)
        self._text += event.line().encode() + b"\n"
        interval = _INTERVAL + _INTERVAL_PER_MEGABYTE * len(self._text) / 1e6
        if time.monotonic() - self._written > interval:
            self.flush()

    def flush(self) -> None:
        """Write the events that the store does not have yet."""
        self._store.put(EVENTS, bytes(self._text))
        self._written = time.monotonic()


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


def steps_of(events: Iterable[Event]) -> list[StepDone]:
    """The steps among events."""
    return [event for event in events if isinstance(event, StepDone)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PassAttempt:
    """One attempt at a pass, as the log has it; `ended` is None while it runs, or if its driver was killed."""

    began: PassBegan
    steps: tuple[StepDone, ...]
    shards: tuple[ShardDone, ...]
    ended: float | None

    @property
    def seconds(self) -> float:
        """From its beginning to its end, or to its last step."""
        last = max((step.at for step in self.steps), default=self.began.at)
        return (last if self.ended is None else self.ended) - self.began.at

    @property
    def token_blocks(self) -> int:
        """Tokens × units that have seen them."""
        return sum((step.tokens or 0) * step.units for step in self.steps)

    def moved(self) -> dict[str, int]:
        """Bytes between workers (hop), from (read) and to (written) the stores."""
        return {
            "hop": sum(step.hop_bytes or 0 for step in self.steps),
            "read": sum(step.read_bytes or 0 for step in self.steps),
            "written": sum(step.written_bytes or 0 for step in self.steps),
        }


def pass_attempts(events: Sequence[Event]) -> list[PassAttempt]:
    """Every attempt at a pass, oldest first; it ends where the next one, or the driver, begins or ends."""
    found = []
    for begin, began in enumerate(events):
        if not isinstance(began, PassBegan):
            continue
        later = range(begin + 1, len(events))
        stop = next((i for i in later if isinstance(events[i], PassBegan | RunEnded | RunBegan)), len(events))
        inside = events[begin:stop]
        # If the next driver's beginning follows, this driver was killed at an unknown time.
        ended = events[stop].at if stop < len(events) and not isinstance(events[stop], RunBegan) else None
        found.append(
            PassAttempt(
                began=began,
                steps=tuple(steps_of(inside)),
                shards=tuple(event for event in inside if isinstance(event, ShardDone)),
                ended=ended,
            )
        )
    return found


def busy_shares(steps: Sequence[StepDone]) -> dict[str, float]:
    """Share of the time between pipeline fill and drain that each worker of a pass was in a call.

    Fill ends when the last worker has begun its first call for blocks (the exit, which all workers share, comes before
    it); drain begins when the first worker has ended its last one. Empty when the pass is too short for that window.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    first: dict[str, float] = {}
    for step in steps:
        spans.setdefault(step.worker, []).append((step.started, step.started + step.seconds))
        if not step.shard.startswith("exit"):
            first[step.worker] = min(step.started, first.get(step.worker, step.started))
    if not first:
        return {}
    begin = max(first.values())
    end = min(max(stop for _, stop in entries) for entries in spans.values())
    if end <= begin:
        return {}
    return {
        worker: sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in entries) / (end - begin)
        for worker, entries in sorted(spans.items())
    }
