"""How long a call may take before its worker counts as hung: many times what such calls took so far."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

from actors.protocol import Call, CallKind

# Times the median. Steps of one kind differ by the weights they load, and by whatever else their machine does.
_FACTOR = 20.0
# Never less, in seconds: a request to storage alone may be repeated for two minutes.
_LEAST = 300.0
# While fewer calls than this have been seen, a call may take so long, in seconds.
_SEEN, _UNKNOWN = 3, 1800.0
# How many of the last calls count.
_KEPT = 64


class Deadlines:
    """Limits in seconds by kind of call. `fixed` is the same for every call; "auto" learns from those that return."""

    def __init__(self, fixed: float | Literal["auto"] = "auto") -> None:
        self._fixed = fixed
        self._took: dict[tuple[object, ...], deque[float]] = {}

    def took(self, call: Call, seconds: float) -> None:
        """A call has returned."""
        self._took.setdefault(_kind(call), deque(maxlen=_KEPT)).append(seconds / _units(call))

    def of(self, call: Call) -> float:
        """Seconds that a call may take."""
        if self._fixed != "auto":
            return self._fixed
        took = self._took.get(_kind(call), ())
        if len(took) < _SEEN:
            return _UNKNOWN
        return max(_LEAST, _FACTOR * statistics.median(took) * _units(call))


def _units(call: Call) -> int:
    return 1 if call.shard is None else len(call.shard.units)


def _kind(call: Call) -> tuple[object, ...]:
    """What makes calls alike: a shard's first microbatch also loads its weights, blocks differ from both ends."""
    shard = call.shard
    if shard is None:
        return (call.kind,)
    first = call.kind is CallKind.RUN and call.microbatch == shard.microbatches[0]
    return call.kind, shard.stage, isinstance(shard.units[0], int), first
