"""The schedule of a pass, as a pure state machine: who runs what next.

Shards form a pipeline over microbatches: step (s, m) needs what step (r, m) put out, where r is the shard before s, or
one of the shards that share the work before it by microbatches. A worker holds one shard at a
time and takes its microbatches in order, then its FINISH step (encode or price), which nothing waits for; then it takes
the first shard that nobody holds. While it has nothing to run, or only its FINISH, it is told which shard that will
most likely be, to read it ahead: the first that neither a worker holds nor another one expects. With equal workers
shard s ends up with worker s mod W, and while worker 0 runs microbatch m of a shard, worker 1 runs m−1 of the next one.
A faster worker takes more shards.

A lost worker's shard goes back to the ones that nobody holds. It starts again from its first microbatch, which is how
every sum stays the same; what it had put out and stored remains valid, so the shards behind it just go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

FINISH = -1


@dataclass(frozen=True, slots=True)
class Step:
    """A microbatch of a shard (its position in the pass), or the shard's FINISH."""

    shard: int
    microbatch: int


class Ring:
    """Which step each worker takes next.

    `microbatches[s]` are those that shard s takes, in order; `sources[s]` gives, for each of them that another shard
    of this pass puts out, which shard that is. The others are read from the store.
    """

    def __init__(self, microbatches: Sequence[Sequence[int]], sources: Sequence[Mapping[int, int]]) -> None:
        if not microbatches or not all(microbatches):
            raise ValueError("a pass needs a shard, and every shard a microbatch")
        for shard, found in enumerate(sources):
            if any(not 0 <= source < shard for source in found.values()):
                raise ValueError(f"shard {shard} can only read from shards before it")
        self.microbatches = tuple(tuple(entry) for entry in microbatches)
        self.sources = tuple(dict(entry) for entry in sources)
        self.held: dict[str, int] = {}
        self.expected: dict[str, int] = {}
        self._position = [0] * len(microbatches)
        self._finished: set[int] = set()
        self._out: set[Step] = set()

    def order(self, workers: Iterable[str]) -> list[str]:
        """Workers as they should be asked for their next step: first those whose expected shard can run."""
        return sorted(workers, key=lambda worker: (not self._is_due(worker), worker))

    def _is_due(self, worker: str) -> bool:
        shard = self.expected.get(worker)
        return shard is not None and shard not in self.held.values() and self._can_run(shard)

    def next(self, worker: str) -> Step | None:
        """The worker's next step if it can run now; the worker holds the shard from then on."""
        shard = self.held.get(worker)
        if shard is None:
            # What it expects comes first, what others expect last: they have read it already.
            ours, theirs = self.expected.get(worker), set(self.expected.values())
            able = (s for s in self._free() if self._can_run(s))
            shard = min(able, key=lambda s: (s != ours, s in theirs, s), default=None)
            if shard is None:
                return None
            self.held[worker] = shard
            self.expected.pop(worker, None)
        return self._at(shard) if self._can_run(shard) else None

    def prefetch(self, worker: str) -> int | None:
        """The shard that the worker should read ahead, when that is news to it."""
        taken = {shard for other, shard in self.expected.items() if other != worker}
        shard = next((s for s in self._free() if s not in taken), None)
        if shard is None or self.expected.get(worker) == shard:
            return None
        self.expected[worker] = shard
        return shard

    def done(self, worker: str, step: Step) -> None:
        """The step's result is there."""
        shard = step.shard
        if self.held.get(worker) != shard or step != self._at(shard):
            raise ValueError(f"{worker} cannot have done {step}: it holds {self.held.get(worker)}")
        if step.microbatch == FINISH:
            self._finished.add(shard)
            del self.held[worker]
        else:
            self._position[shard] += 1
            self._out.add(step)

    def released(self, worker: str) -> int | None:
        """The worker is gone, or gives its shard up; the shard starts again with whoever takes it next."""
        self.expected.pop(worker, None)
        shard = self.held.pop(worker, None)
        if shard is not None:
            self._position[shard] = 0
        return shard

    def vanished(self, step: Step) -> None:
        """What a step put out can no longer be read; the shard that still needs it waits for it to appear again."""
        self._out.discard(step)

    def appeared(self, step: Step) -> None:
        """What a step put out can be read, because it has reached the store."""
        self._out.add(step)

    def blocking(self) -> list[int]:
        """Shards that nobody holds and that could run now, first to last."""
        return [shard for shard in self._free() if self._can_run(shard)]

    def is_finished(self, shard: int) -> bool:
        """Whether a shard's FINISH is done."""
        return shard in self._finished

    @property
    def finished(self) -> bool:
        """Every shard is finished."""
        return len(self._finished) == len(self.microbatches)

    @property
    def unfinished(self) -> int:
        """How many shards are not finished."""
        return len(self.microbatches) - len(self._finished)

    def _free(self) -> Iterator[int]:
        taken = set(self.held.values())
        return (s for s in range(len(self.microbatches)) if s not in taken and s not in self._finished)

    def source(self, step: Step) -> Step | None:
        """The step whose output a step reads; None when it reads from the store."""
        shard = self.sources[step.shard].get(step.microbatch)
        return None if shard is None else Step(shard, step.microbatch)

    def _at(self, shard: int) -> Step:
        position, microbatches = self._position[shard], self.microbatches[shard]
        return Step(shard, FINISH if position == len(microbatches) else microbatches[position])

    def _can_run(self, shard: int) -> bool:
        source = self.source(self._at(shard))
        return source is None or source in self._out
