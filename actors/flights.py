"""Calls under way: what each worker was asked, since when, and which of them take too long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, KeysView
from dataclasses import dataclass

from actors.deadlines import Deadlines
from actors.protocol import Call, CallKind
from actors.schedule.ring import Step
from prismaquant_ray.events import Waiting

#: Seconds without a reply after which a run says what it waits for, and between two such lines.
QUIET = 10.0
# Calls that such a line names.
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Flight:
    """A call to a worker; `step` if it is one of a pass. `since` is the controller's clock."""

    call: Call
    step: Step | None
    since: float


class Flights:
    """The calls under way by worker, each of which has at most one."""

    def __init__(self, deadlines: Deadlines, clock: Callable[[], float]) -> None:
        self._deadlines = deadlines
        self._clock = clock
        self._flights: dict[str, Flight] = {}
        # When a reply last came, and when the wait was last told.
        self._heard = self._told = clock()

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights.values())

    @property
    def workers(self) -> KeysView[str]:
        """Workers with a call under way."""
        return self._flights.keys()

    def begin(self, worker: str, call: Call, step: Step | None = None) -> None:
        """A worker is asked."""
        self._flights[worker] = Flight(call, step, self._clock())

    def end(self, worker: str) -> Flight:
        """It has answered, or never will."""
        self._heard = self._told = self._clock()
        return self._flights.pop(worker)

    def answered(self, flight: Flight) -> None:
        """How long calls of its kind take is learned from one that was carried out."""
        self._deadlines.took(flight.call, self._clock() - flight.since)

    def overdue(self) -> list[tuple[str, Flight, float]]:
        """Calls that take longer than they may, which is the last value. A worker may take any time to start."""
        now = self._clock()
        found = []
        for worker, flight in self._flights.items():
            limit = self._deadlines.of(flight.call)
            if flight.call.kind is not CallKind.HELLO and now - flight.since > limit:
                found.append((worker, flight, limit))
        return found

    def working(self, patience: float) -> bool:
        """Whether a reply may soon change what others can do: not that of a worker that starts for so many seconds."""
        now = self._clock()
        starting = {CallKind.HELLO: 0.0, CallKind.SETUP: patience}
        return any(now - each.since < starting.get(each.call.kind, math.inf) for each in self)

    def awaited(self, named: Callable[[str], str]) -> Waiting | None:
        """What to say when nothing has been said for a while; `named` is a worker as people know it."""
        now = self._clock()
        if now - self._told < QUIET:
            return None
        self._told = now
        oldest = sorted(self._flights.items(), key=lambda entry: entry[1].since)
        calls = [f"{named(worker)}: {flight.call}, {now - flight.since:.0f} s" for worker, flight in oldest[:_NAMED]]
        if len(oldest) > _NAMED:
            calls.append(f"{len(oldest) - _NAMED} more")
        return Waiting(message=f"nothing new for {now - self._heard:.0f} s; under way: {'; '.join(calls) or 'nothing'}")
