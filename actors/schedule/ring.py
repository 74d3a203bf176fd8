"""The schedule of a pass, as a pure state machine: which worker runs which step next.

Shards form a pipeline over microbatches: step (s, m) reads the output of step (r, m), where r is the shard before s, or
one of several shards before it that split the microbatches. A worker holds one shard at a time and takes its
microbatches in order, then its FINISH step (encode or price), which nothing waits for; then it takes the first free
shard. While it idles, or runs FINISH, it prefetches the shard that it will most likely get: the first that is free and
that no other worker expects. With equal workers shard s ends up with worker s mod W, and while worker 0 runs microbatch
m of a shard, worker 1 runs m−1 of the next one. A faster worker takes more shards.

A lost worker's shard becomes free again. It restarts from its first microbatch, so every sum is the same; its stored
outputs remain valid, so the shards behind it just go on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FINISH = -1


@dataclass(frozen=True, slots=True)
class Step:
    """A microbatch of a shard (its position in the pass), or the shard's FINISH."""

    shard: int
    microbatch: int


class Ring:
    """Assigns steps to workers.

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
        self.sources = tuple(sources)
        self.held: dict[str, int] = {}
        self.expected: dict[str, int] = {}
        self._position = [0] * len(microbatches)
        self._finished: set[int] = set()
        # Of shards that are not finished: all that a finished one puts out can be read.
        self._out: set[Step] = set()
        # Kept up to date by every change, because every event asks: a pass may have thousands of shards.
        self._free = list(range(len(microbatches)))
        self._able: set[int] = set()
        # Of free and expected shards; and at which of them a worker was last told what to prefetch.
        self._changes = 0
        self._answered: dict[str, int] = {}
        self._begun_by: dict[Step, list[int]] = {}
        self._readers: list[set[int]] = [set() for _ in microbatches]
        for shard, found in enumerate(self.sources):
            for before in {*found.values()}:
                self._readers[before].add(shard)
        for shard in self._free:
            source = self.source(self._at(shard))
            if source is None:
                self._able.add(shard)
            else:
                self._begun_by.setdefault(source, []).append(shard)

    def order(self, workers: Iterable[str]) -> list[str]:
        """Workers in the order in which to call `next`: first those whose expected shard can run."""
        return sorted(workers, key=lambda worker: (not self._is_due(worker), worker))

    def _is_due(self, worker: str) -> bool:
        return self.expected.get(worker) in self._able

    def next(self, worker: str) -> Step | None:
        """The worker's next step if it can run now; the worker holds the shard from then on."""
        shard = self.held.get(worker)
        if shard is None:
            # Its own expected shard first, those of others last: they have prefetched them.
            ours, theirs = self.expected.get(worker), set(self.expected.values())
            shard = min(self._able, key=lambda s: (s != ours, s in theirs, s), default=None)
            if shard is None:
                return None
            self.held[worker] = shard
            self._able.remove(shard)
            del self._free[bisect_left(self._free, shard)]
            self.expected.pop(worker, None)
            self._changes += 1
        return self._at(shard) if self._can_run(shard) else None

    def prefetch(self, worker: str) -> int | None:
        """The shard that the worker should prefetch; None without one, or if it already does."""
        if self._answered.get(worker) == self._changes:
            return None  # idle workers are asked at every event, and most events change nothing here
        self._answered[worker] = self._changes
        taken = {shard for other, shard in self.expected.items() if other != worker}
        shard = next((s for s in self._free if s not in taken), None)
        if shard is None or self.expected.get(worker) == shard:
            return None
        self.expected[worker] = shard
        self._changes += 1
        return shard

    def done(self, worker: str, step: Step) -> None:
        """The worker has completed the step.

        Raises:
            ValueError: the worker does not hold that shard, or it is at another step.
        """
        shard = step.shard
        if self.held.get(worker) != shard or step != self._at(shard):
            raise ValueError(f"{worker} cannot have done {step}: it holds {self.held.get(worker)}")
        if step.microbatch == FINISH:
            self._finished.add(shard)
            del self.held[worker]
            for microbatch in self.microbatches[shard]:
                self._out.discard(Step(shard, microbatch))
                self._look(Step(shard, microbatch))
        else:
            self._position[shard] += 1
            self.appeared(step)

    def released(self, worker: str) -> int | None:
        """The worker is lost or yields its shard, which restarts with the next worker that takes it."""
        self.expected.pop(worker, None)
        self._changes += 1
        shard = self.held.pop(worker, None)
        if shard is not None:
            self._position[shard] = 0
            insort(self._free, shard)
            if self._can_run(shard):
                self._able.add(shard)
        return shard

    def vanished(self, step: Step) -> None:
        """A step's output can no longer be read; the shard that still needs it waits until it appears again."""
        self._out.discard(step)
        self._look(step)

    def appeared(self, step: Step) -> None:
        """A step's output can be read, because it has reached the store."""
        if step.shard not in self._finished:
            self._out.add(step)
            self._look(step)

    def _look(self, step: Step) -> None:
        """Which free shards can run, after a step's output has come or gone: a free one is at its beginning."""
        begun = (shard for shard in self._begun_by.get(step, ()) if self._is_free(shard))
        (self._able.update if self._can_read(step) else self._able.difference_update)(begun)

    def blocking(self) -> list[int]:
        """Free shards that could run now, first to last."""
        return sorted(self._able)

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

    def _is_free(self, shard: int) -> bool:
        place = bisect_left(self._free, shard)
        return place < len(self._free) and self._free[place] == shard

    def source(self, step: Step) -> Step | None:
        """The step whose output a step reads; None when it reads from the store."""
        shard = self.sources[step.shard].get(step.microbatch)
        return None if shard is None else Step(shard, step.microbatch)

    def readers(self, step: Step) -> set[int]:
        """The shards that read a step's output and are not finished."""
        readers = self._readers[step.shard] - self._finished
        return {shard for shard in readers if self.sources[shard].get(step.microbatch) == step.shard}

    def _at(self, shard: int) -> Step:
        position, microbatches = self._position[shard], self.microbatches[shard]
        return Step(shard, FINISH if position == len(microbatches) else microbatches[position])

    def _can_run(self, shard: int) -> bool:
        source = self.source(self._at(shard))
        return source is None or self._can_read(source)

    def _can_read(self, step: Step) -> bool:
        return step.shard in self._finished or step in self._out
