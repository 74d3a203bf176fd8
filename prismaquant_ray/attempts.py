"""What the log of a run says of each attempt at a pass: seconds, tokens, bytes, and how busy workers were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from prismaquant_ray.event_log import steps_by_shard
from prismaquant_ray.events import Event, PassBegan, RunBegan, RunEnded, ShardDone, ShardSteps, StepDone


@dataclass(frozen=True, kw_only=True, slots=True)
class PassAttempt:
    """One attempt at a pass, as the log has it; `ended` is None while it runs, or if its driver was killed."""

    began: PassBegan
    work: tuple[ShardSteps, ...]
    shards: tuple[ShardDone, ...]
    ended: float | None

    @property
    def seconds(self) -> float:
        """From its beginning to its end, or to its last step."""
        last = max((work.at for work in self.work), default=self.began.at)
        return (last if self.ended is None else self.ended) - self.began.at

    @property
    def token_blocks(self) -> int:
        """Tokens × units that have seen them."""
        return sum((work.tokens or 0) * work.units for work in self.work)

    def moved(self) -> dict[str, int]:
        """Bytes between workers (hop), from (read) and to (written) the stores."""
        return {
            "hop": sum(work.hop_bytes or 0 for work in self.work),
            "read": sum(work.read_bytes or 0 for work in self.work),
            "written": sum(work.written_bytes or 0 for work in self.work),
        }


def pass_attempts(events: Sequence[Event]) -> list[PassAttempt]:
    """Every attempt at a pass, oldest first; it ends where the next one, or the driver, begins or ends."""
    bounds = [place for place, event in enumerate(events) if isinstance(event, PassBegan | RunEnded | RunBegan)]
    found = []
    for begin, stop in pairwise([*bounds, len(events)]):
        began, inside = events[begin], events[begin:stop]
        if not isinstance(began, PassBegan):
            continue
        # If the next driver's beginning follows, this driver was killed at an unknown time.
        ended = events[stop].at if stop < len(events) and not isinstance(events[stop], RunBegan) else None
        found.append(
            PassAttempt(
                began=began,
                work=tuple(steps_by_shard(inside)),
                shards=tuple(event for event in inside if isinstance(event, ShardDone)),
                ended=ended,
            )
        )
    return found


def busy_shares(calls: Sequence[StepDone] | Sequence[ShardSteps]) -> dict[str, float]:
    """Share of the time between pipeline fill and drain that each worker of a pass was in a call.

    Fill ends when the last worker has begun its first call for blocks (the exit, which all workers share, comes before
    it); drain begins when the first worker has ended its last one. Empty when the pass is too short for that window.
    Of a shard that lies across an end of the window, the part inside is taken to be as busy as the whole.
    """
    spans: dict[str, list[StepDone | ShardSteps]] = {}
    first: dict[str, float] = {}
    for each in calls:
        spans.setdefault(each.worker, []).append(each)
        if not each.shard.startswith("exit"):
            first[each.worker] = min(each.started, first.get(each.worker, each.started))
    if not first:
        return {}
    begin = max(first.values())
    end = min(max(each.ended for each in own) for own in spans.values())
    if end <= begin:
        return {}
    return {
        worker: sum(_inside(each, begin, end) for each in own) / (end - begin) for worker, own in sorted(spans.items())
    }


def _inside(calls: StepDone | ShardSteps, begin: float, end: float) -> float:
    """Seconds in calls between two times."""
    length = calls.ended - calls.started
    inside = min(calls.ended, end) - max(calls.started, begin)
    return calls.seconds * inside / length if inside > 0 and length > 0 else 0.0
