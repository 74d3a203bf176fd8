"""The remaining shards of a pass: pure functions of its records.

A pass runs through its units in order. A unit must run when its own product is missing, or when a later unit needs
its output and that is not stored. Runs of such units are cut into shards of at most `limit` blocks. The same
rule serves a first run, a resumed one, another shard size, and the repair of a single damaged object.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache

from actors.schedule.pass_graph import PassGraph
from actors.schedule.run_store import Recorded
from actors.schedule.units import Exit, Shard, Stage, Unit

#: Shards that a worker should get in a pass; filling and draining the pipeline takes about 1 / SHARDS_PER_WORKER of it.
SHARDS_PER_WORKER = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The remaining shards of a measurement."""

    forward: tuple[Shard, ...]
    backward: tuple[Shard, ...]

    def of(self, stage: Stage) -> tuple[Shard, ...]:
        """The shards of one pass, in order."""
        return self.forward if stage is Stage.FORWARD else self.backward


def pending_shards(graph: PassGraph, forward: Recorded, backward: Recorded, *, limit: int) -> Work:
    """The shards of both passes, at most `limit` blocks each.

    Backward shards are cut where forward boundaries are stored, if they are: each reads the one it starts from.
    """
    order = graph.order(Stage.BACKWARD)
    missing = {unit for unit in order if unit not in backward.done}
    needed = _needed(graph, Stage.BACKWARD, missing, backward.boundaries)
    pieces = []
    for run in _runs(graph, order, needed):
        pieces += _cut_backward(graph, run, limit, forward.boundaries)
    exits = [unit for unit in graph.exits if graph.last in needed and unit not in backward.boundaries]
    read = {graph.below(piece[-1]) for piece in pieces} | ({graph.last} if exits else set())
    singles: list[list[Unit]] = [[unit] for unit in exits]
    backward_shards = [_shard(graph, Stage.BACKWARD, piece, missing) for piece in (*singles, *pieces)]

    order = graph.order(Stage.FORWARD)
    missing = graph.products(Stage.FORWARD).intersection(order) - forward.done
    read -= forward.boundaries
    forward_shards = []
    for run in _runs(graph, order, _needed(graph, Stage.FORWARD, [*missing, *read], forward.boundaries)):
        forward_shards += [_shard(graph, Stage.FORWARD, piece, missing) for piece in _cut_forward(run, limit, read)]
    return Work(forward=tuple(forward_shards), backward=tuple(backward_shards))


def pending_evaluation_shards(graph: PassGraph, recorded: Recorded, *, limit: int) -> tuple[Shard, ...]:
    """The remaining shards of an evaluation, at most `limit` blocks each."""
    order = graph.order(Stage.EVALUATION)
    missing = graph.products(Stage.EVALUATION).intersection(order) - recorded.done
    needed = _needed(graph, Stage.EVALUATION, missing, recorded.boundaries)
    pieces = [piece for run in _runs(graph, order, needed) for piece in _cut_forward(run, limit, ())]
    return tuple(_shard(graph, Stage.EVALUATION, piece, missing) for piece in pieces)


def _shard(graph: PassGraph, stage: Stage, piece: list[Unit], missing: AbstractSet[Unit]) -> Shard:
    return Shard(
        stage=stage,
        units=tuple(piece),
        produce=frozenset(piece) & missing,
        origins=graph.reads(stage, piece[0]),
        microbatches=graph.microbatches(piece[0]),
    )


def droppable_boundaries(
    graph: PassGraph, finished: Collection[Unit], left: Collection[Unit]
) -> list[tuple[Stage, Unit]]:
    """Boundaries that are not needed once the `finished` units of the backward pass are; `left` are unfinished.

    A gradient goes when its producer and its consumer are done, in either order: a lost producer is run again and reads
    its own input once more. A forward boundary goes when everything that recomputes from it is done.
    """
    found: list[tuple[Stage, Unit]] = []
    gradients: list[Unit] = [unit for unit in finished if unit not in graph.heads]
    for unit in finished:
        if isinstance(unit, int) and unit not in graph.heads:
            found.append((Stage.FORWARD, graph.below(unit)))
            if unit == graph.first and graph.vision:
                found.append((Stage.FORWARD, graph.vision - 1))  # the merger's, which only the entry reads
            gradients += graph.reads(Stage.BACKWARD, unit)
    found += [
        (Stage.BACKWARD, gradient)
        for gradient in dict.fromkeys(gradients)
        if gradient not in left and graph.reader(gradient) not in left
    ]
    readers = set(graph.readers_of_last())
    if not readers.isdisjoint(finished) and readers.isdisjoint(left):
        found.append((Stage.FORWARD, graph.last))
    return found


def droppable_evaluation_boundaries(
    graph: PassGraph, finished: Collection[Unit], left: Collection[Unit]
) -> list[tuple[Stage, Unit]]:
    """Boundaries of an evaluation that are not read again once `finished` units are; `left` are unfinished."""
    stage, readers = Stage.EVALUATION, _evaluation_readers(graph)
    origins = dict.fromkeys(origin for unit in finished for origin in graph.reads(stage, unit))
    return [(stage, origin) for origin in origins if not any(reader in left for reader in readers[origin])]


@lru_cache(maxsize=1)
def _evaluation_readers(graph: PassGraph) -> dict[Unit, list[Unit]]:
    """The units that read each unit's output; asked for after every shard."""
    readers: dict[Unit, list[Unit]] = {}
    for unit in graph.order(Stage.EVALUATION):
        for origin in graph.reads(Stage.EVALUATION, unit):
            readers.setdefault(origin, []).append(unit)
    return readers


def blocks_per_shard(*, blocks: int, workers: int, fitting: int) -> int:
    """As many blocks as fit into memory and leave every worker enough shards; at least one."""
    return max(1, min(fitting, math.ceil(blocks / (SHARDS_PER_WORKER * workers))))


def _needed(graph: PassGraph, stage: Stage, targets: Collection[Unit], stored: Collection[Unit]) -> set[Unit]:
    """The targets and all units that they read, back to stored outputs; exits only in an evaluation."""
    needed: set[Unit] = set()
    waiting = list(targets)
    while waiting:
        unit = waiting.pop()
        if unit not in needed and (stage is Stage.EVALUATION or not isinstance(unit, Exit)):
            needed.add(unit)
            waiting += [origin for origin in graph.reads(stage, unit) if origin not in stored]
    return needed


def _runs(graph: PassGraph, order: Sequence[Unit], needed: Collection[Unit]) -> list[list[Unit]]:
    """Maximal stretches of consecutive needed units that may share a shard."""
    runs: list[list[Unit]] = []
    before: Unit | None = None
    for unit in order:
        if unit in needed:
            if before in needed and before is not None and graph.joined(before, unit):
                runs[-1].append(unit)
            else:
                runs.append([unit])
        before = unit
    return runs


def _cut_forward(run: list[Unit], limit: int, ends: Collection[Unit]) -> list[list[Unit]]:
    """Pieces of about equal length, each ending at the latest where the backward pass wants to read."""
    pieces: list[list[Unit]] = [[]]
    for unit in run:
        pieces[-1].append(unit)
        if unit in ends and unit != run[-1]:
            pieces.append([])
    return [part for piece in pieces for part in _even(piece, limit)]


def _cut_backward(graph: PassGraph, run: list[Unit], limit: int, stored: Collection[Unit]) -> list[list[Unit]]:
    """Pieces that start from a stored forward boundary where one is near enough, else of about equal length."""
    pieces: list[list[Unit]] = []
    start = 0
    while start < len(run):
        left = len(run) - start
        ends = [size for size in range(1, min(limit, left) + 1) if graph.below(run[start + size - 1]) in stored]
        # Without an end, the first of the fewest pieces of equal length.
        size = ends[-1] if ends else math.ceil(left / math.ceil(left / limit))
        pieces.append(run[start : start + size])
        start += size
    return pieces


def _even(units: list[Unit], limit: int) -> list[list[Unit]]:
    """The fewest pieces of at most `limit` units, of equal length ± 1, the longer ones first."""
    count = math.ceil(len(units) / limit)
    short, longer = divmod(len(units), count)
    pieces, start = [], 0
    for index in range(count):
        stop = start + short + (index < longer)
        pieces.append(units[start:stop])
        start = stop
    return pieces
