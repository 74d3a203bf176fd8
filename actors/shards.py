"""Which shards a pass still has to visit: pure functions of what is recorded.

A pass runs through its units in order. A unit must run when its own product is missing, or when a unit behind it needs
what it puts out and that is not stored. Runs of such units are cut into shards of at most `limit` blocks. The same
rule serves a first run, a resumed one, another shard size, and the repair of a single damaged object.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from actors.ledger import Recorded
from actors.messages import Exit, Shard, Stage, Unit

#: Shards a worker should visit in a pass: filling and draining the pipeline costs about 1/VISITS of a worker's time.
VISITS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is left to do."""

    forward: tuple[Shard, ...]
    backward: tuple[Shard, ...]

    def of(self, stage: Stage) -> tuple[Shard, ...]:
        """The shards of one pass, in order."""
        return self.forward if stage is Stage.FORWARD else self.backward


def remaining(blocks: int, microbatches: int, forward: Recorded, backward: Recorded, *, limit: int) -> Work:
    """The shards of both passes for a model of `blocks` blocks, at most `limit` blocks each.

    Backward shards are cut where forward boundaries are stored, if they are: each reads the one it starts from.
    """
    last = blocks - 1
    every = tuple(range(microbatches))
    order: list[Unit] = list(reversed(range(blocks)))
    missing = [unit for unit in order if unit not in backward.done]
    pieces = []
    for run in _runs(order, _needed(order, missing, backward.boundaries)):
        pieces += _cut_backward(run, limit, forward.boundaries)
    exits = tuple(Exit(microbatch) for microbatch in every)
    backward_shards = [
        Shard(stage=Stage.BACKWARD, units=(unit,), produce=frozenset(), origins=(), microbatches=(unit.microbatch,))
        for unit in exits
        if pieces and pieces[0][0] == last and unit not in backward.boundaries
    ]
    read = {below(piece[-1]) for piece in pieces} | ({last} if backward_shards else set())
    for piece in pieces:
        origins: tuple[Unit, ...] = exits if piece[0] == last else (_block(piece[0]) + 1,)
        backward_shards.append(_shard(Stage.BACKWARD, piece, missing, origins, every))

    order = ["entry", *range(blocks)]
    missing = [unit for unit in order if unit not in forward.done and unit != "entry"]
    read -= forward.boundaries
    forward_shards = []
    for run in _runs(order, _needed(order, [*missing, *read], forward.boundaries)):
        for piece in _cut_forward(run, limit, read):
            origins = () if piece[0] == "entry" else (below(piece[0]),)
            forward_shards.append(_shard(Stage.FORWARD, piece, missing, origins, every))
    return Work(forward=tuple(forward_shards), backward=tuple(backward_shards))


def below(unit: Unit) -> Unit:
    """The unit that puts out what a block reads."""
    return "entry" if unit == 0 else _block(unit) - 1


def _shard(
    stage: Stage, piece: list[Unit], missing: Collection[Unit], origins: tuple[Unit, ...], every: tuple[int, ...]
) -> Shard:
    produce = frozenset(piece) & frozenset(missing)
    return Shard(stage=stage, units=tuple(piece), produce=produce, origins=origins, microbatches=every)


def _block(unit: Unit) -> int:
    assert isinstance(unit, int)
    return unit


def spent(
    finished: Collection[Unit], left: Collection[Unit], *, blocks: int, microbatches: int
) -> list[tuple[Stage, Unit]]:
    """Boundaries that nobody needs once these units of the backward pass are finished; `left` are those that are not.

    A gradient goes when its producer and its consumer are done, in either order: a lost producer is run again and reads
    its own input once more. A forward boundary goes when everything that recomputes from it is done.
    """
    last = blocks - 1
    exits = [Exit(microbatch) for microbatch in range(microbatches)]
    found: list[tuple[Stage, Unit]] = []
    gradients: list[Unit] = [*finished]
    for unit in finished:
        if isinstance(unit, int):
            found.append((Stage.FORWARD, below(unit)))
            gradients += exits if unit == last else [unit + 1]
    for gradient in dict.fromkeys(gradients):
        consumer = last if isinstance(gradient, Exit) else _block(gradient) - 1
        if gradient not in left and consumer not in left:
            found.append((Stage.BACKWARD, gradient))
    readers = {last, *exits}
    if readers & set(finished) and not readers & set(left):
        found.append((Stage.FORWARD, last))
    return found


def blocks_per_shard(*, blocks: int, workers: int, fitting: int) -> int:
    """As many blocks as fit into memory, but not so many that the pipeline stays short of work; at least one."""
    return max(1, min(fitting, math.ceil(blocks / (VISITS * workers))))


def _needed(order: Sequence[Unit], targets: Collection[Unit], stored: Collection[Unit]) -> set[Unit]:
    """The targets, and everything before each of them back to a stored output."""
    position = {unit: index for index, unit in enumerate(order)}
    needed: set[Unit] = set()
    for target in targets:
        index = position[target]
        needed.add(target)
        while index > 0 and order[index - 1] not in stored and order[index - 1] not in needed:
            index -= 1
            needed.add(order[index])
    return needed


def _runs(order: Sequence[Unit], needed: Collection[Unit]) -> list[list[Unit]]:
    """Maximal stretches of consecutive needed units; the entry is a stretch of its own."""
    runs: list[list[Unit]] = []
    after_needed = False
    for unit in order:
        if unit in needed:
            if after_needed and isinstance(runs[-1][-1], int):
                runs[-1].append(unit)
            else:
                runs.append([unit])
        after_needed = unit in needed
    return runs


def _cut_forward(run: list[Unit], limit: int, ends: Collection[Unit]) -> list[list[Unit]]:
    """Pieces of about equal length, each ending at the latest where the backward pass wants to read."""
    pieces: list[list[Unit]] = [[]]
    for unit in run:
        pieces[-1].append(unit)
        if unit in ends and unit != run[-1]:
            pieces.append([])
    return [part for piece in pieces for part in _even(piece, limit)]


def _cut_backward(run: list[Unit], limit: int, stored: Collection[Unit]) -> list[list[Unit]]:
    """Pieces that start from a stored forward boundary where one is near enough, else of about equal length."""
    pieces: list[list[Unit]] = []
    rest = run
    while rest:
        ends = [size for size in range(1, min(limit, len(rest)) + 1) if below(rest[size - 1]) in stored]
        size = ends[-1] if ends else len(_even(rest, limit)[0])
        pieces.append(rest[:size])
        rest = rest[size:]
    return pieces


def _even(units: list[Unit], limit: int) -> list[list[Unit]]:
    """As few pieces of at most `limit` as there can be, the longer ones first."""
    count = math.ceil(len(units) / limit)
    short, longer = divmod(len(units), count)
    pieces, start = [], 0
    for index in range(count):
        stop = start + short + (index < longer)
        pieces.append(units[start:stop])
        start = stop
    return pieces
