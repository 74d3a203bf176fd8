"""What happens during a run, as events: one place that says it, many that listen (log, terminal, metrics).

The log is `events.jsonl` in the run store: a JSON object a line, oldest first, over all attempts of the run. Only the
driver that holds the run's lease writes it. Object stores cannot append, so the whole object is put again, less and
less often as it grows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prismaquant_ray.errors import StoreError
from prismaquant_ray.storage.store import Store

LOG = "events.jsonl"
# Seconds between two puts, and how many more for every megabyte of log.
_INTERVAL = 2.0
_INTERVAL_PER_MEGABYTE = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened: its kind, when (seconds since the epoch), and plain values that say what."""

    kind: str
    at: float
    payload: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """As it stands in the log."""
        return json.dumps({"at": round(self.at, 3), "event": self.kind, **self.payload}, allow_nan=False)


#: Told of every event, in order.
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

    def __call__(self, kind: str, **payload: Any) -> None:
        """Something happens now."""
        event = Event(kind=kind, at=time.time(), payload=payload)
        for listener in self.listeners:
            listener(event)


class EventLog:
    """The log of a run; continues what is there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        try:
            self._text = bytearray(store.get(LOG))
        except KeyError:
            self._text = bytearray()
        self._written = time.monotonic()
        steps = [event.payload for event in _parse(bytes(self._text), store) if event.kind == "step"]
        #: The most memory a worker has taken, over all attempts.
        self.peak_bytes: int = max((step["peak_bytes"] for step in steps), default=0)

    def __call__(self, event: Event) -> None:
        """Add an event; it reaches the store within seconds."""
        if event.kind == "step":
            self.peak_bytes = max(self.peak_bytes, event.payload["peak_bytes"])
        self._text += event.line().encode() + b"\n"
        interval = _INTERVAL + _INTERVAL_PER_MEGABYTE * len(self._text) / 1e6
        if time.monotonic() - self._written > interval:
            self.flush()

    def flush(self) -> None:
        """Write what the store does not have yet."""
        self._store.put(LOG, bytes(self._text))
        self._written = time.monotonic()


def read_events(store: Store) -> list[Event]:
    """The log of a run, oldest first; empty before anything happened."""
    try:
        text = store.get(LOG)
    except KeyError:
        return []
    return _parse(text, store)


def _parse(text: bytes, store: Store) -> list[Event]:
    try:
        bodies = [json.loads(line) for line in text.decode().splitlines()]
        return [Event(kind=body.pop("event"), at=body.pop("at"), payload=body) for body in bodies]
    except (ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"{store.uri}: {LOG} is damaged; delete it, it is only a log") from error


def busy_shares(steps: Sequence[Event]) -> dict[str, float]:
    """Share of the time between pipeline fill and drain that each worker of a pass was in a call, from `step` events.

    Fill ends when the last worker has begun its first call for blocks (the exit, which all workers share, comes before
    it); drain begins when the first worker has ended its last one. Empty when the pass is too short for that window.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    first: dict[str, float] = {}
    for event in steps:
        worker, started = event.payload["worker"], event.payload["started"]
        spans.setdefault(worker, []).append((started, started + event.payload["seconds"]))
        if not event.payload["shard"].startswith("exit"):
            first[worker] = min(started, first.get(worker, started))
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
