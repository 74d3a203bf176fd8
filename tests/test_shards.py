"""Claims about which shards a pass still has to visit."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ledger import Recorded
from actors.messages import Exit, Shard, Stage, Unit
from actors.shards import Work, below, blocks_per_shard, remaining, spent

NOTHING = Recorded(done=frozenset(), boundaries=frozenset())


def forward_units(blocks: int) -> list[Unit]:
    return ["entry", *range(blocks)]


def backward_units(blocks: int, microbatches: int) -> list[Unit]:
    return [*map(Exit, range(microbatches)), *reversed(range(blocks))]


@st.composite
def states(draw: st.DrawFn) -> tuple[int, int, Recorded, Recorded, int]:
    """Any set of records, also ones no run would leave."""
    blocks, microbatches = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    recorded = [
        Recorded(
            done=draw(st.frozensets(st.sampled_from(range(blocks)))),
            boundaries=draw(st.frozensets(st.sampled_from(units))),
        )
        for units in (forward_units(blocks), backward_units(blocks, microbatches))
    ]
    return blocks, microbatches, recorded[0], recorded[1], draw(st.integers(1, 13))


@settings(max_examples=500)
@given(state=states())
def test_the_plan_makes_all_that_is_missing_from_what_is_there(
    state: tuple[int, int, Recorded, Recorded, int],
) -> None:
    blocks, microbatches, forward, backward, limit = state
    work = remaining(blocks, microbatches, forward, backward, limit=limit)
    there = {Stage.FORWARD: set(forward.boundaries), Stage.BACKWARD: set(backward.boundaries)}
    made: dict[Stage, list[Unit]] = {stage: [] for stage in Stage}
    exits = [Exit(microbatch) for microbatch in range(microbatches)]
    for shard in (*work.forward, *work.backward):
        first, last = shard.units[0], shard.units[-1]
        assert len(shard.units) <= limit or len(shard.units) == 1
        if isinstance(first, Exit):
            assert (shard.units, shard.origins) == ((first,), ())
            assert shard.microbatches == (first.microbatch,)
            assert blocks - 1 in there[Stage.FORWARD], "the boundary it reads"
        else:
            assert shard.microbatches == tuple(range(microbatches))
            order = forward_units(blocks) if shard.stage is Stage.FORWARD else backward_units(blocks, 1)
            start = order.index(first)
            assert tuple(order[start : start + len(shard.units)]) == shard.units, (
                "consecutive, in the order of the pass"
            )
            if shard.stage is Stage.BACKWARD and first == blocks - 1:
                assert list(shard.origins) == exits
            else:
                assert shard.origins == (() if start == 0 else (order[start - 1],))
        assert set(shard.origins) <= there[shard.stage], "its input is stored, or an earlier shard puts it out"
        if shard.stage is Stage.BACKWARD and isinstance(last, int):
            assert below(last) in there[Stage.FORWARD], "the boundary it recomputes from"
        there[shard.stage].add(last)
        made[shard.stage] += shard.produce
    for stage, recorded in ((Stage.FORWARD, forward), (Stage.BACKWARD, backward)):
        assert sorted(made[stage]) == sorted(set(range(blocks)) - recorded.done), "every missing product once, no other"


def names(shards: tuple[Shard, ...]) -> list[str]:
    return [shard.name for shard in shards]


def test_a_first_run_visits_everything_in_shards_of_about_equal_size() -> None:
    work = remaining(7, 2, NOTHING, NOTHING, limit=3)
    assert names(work.backward) == ["exit-00000", "exit-00001", "0006-0004", "0003-0002", "0001-0000"]
    # Cut where the backward pass will read, so that it finds a boundary below each of its shards.
    assert names(work.forward) == ["entry", "0000-0001", "0002-0003", "0004-0006"]


def test_nothing_is_left_of_a_finished_run() -> None:
    done = Recorded(done=frozenset(range(5)), boundaries=frozenset())
    assert remaining(5, 2, done, done, limit=2) == Work(forward=(), backward=())


def test_a_resumed_backward_pass_uses_the_boundaries_that_are_stored() -> None:
    forward = Recorded(done=frozenset(range(8)), boundaries=frozenset({"entry", 1, 3, 5, 7}))
    work = remaining(8, 2, forward, Recorded(done=frozenset(), boundaries=frozenset({Exit(0)})), limit=3)
    assert work.forward == ()
    assert names(work.backward) == ["exit-00001", "0007-0006", "0005-0004", "0003-0002", "0001-0000"]


def test_one_damaged_candidate_costs_a_run_up_to_its_block_and_one_encoding() -> None:
    done = Recorded(done=frozenset(range(6)), boundaries=frozenset())
    work = remaining(6, 2, Recorded(done=done.done - {3}, boundaries=frozenset()), done, limit=2)
    assert names(work.forward) == ["entry", "0000-0001", "0002-0003"]
    assert [set(shard.produce) for shard in work.forward] == [set(), set(), {3}]
    assert work.backward == ()


def test_auto_shards_fill_memory_but_leave_every_worker_four_visits() -> None:
    assert blocks_per_shard(blocks=64, workers=2, fitting=100) == 8
    assert blocks_per_shard(blocks=64, workers=2, fitting=3) == 3
    assert blocks_per_shard(blocks=64, workers=100, fitting=3) == 1
    assert blocks_per_shard(blocks=64, workers=2, fitting=-5) == 1


@settings(max_examples=300)
@given(blocks=st.integers(1, 8), microbatches=st.integers(1, 3), chance=st.randoms(use_true_random=False))
def test_boundaries_go_when_producer_and_consumer_are_done_and_all_of_them_go(
    blocks: int, microbatches: int, chance: Any
) -> None:
    order = backward_units(blocks, microbatches)
    chance.shuffle(order)  # units finish in any order that a lossy cluster makes up
    left = set(order)
    gone: set[tuple[Stage, Unit]] = set()
    exits = {Exit(microbatch) for microbatch in range(microbatches)}
    while order:
        finished = [order.pop() for _ in range(min(len(order), chance.randint(1, 3)))]
        left -= set(finished)
        gone |= set(spent(finished, left, blocks=blocks, microbatches=microbatches))
        for stage, unit in gone:
            if stage is Stage.BACKWARD:
                assert unit not in left
                assert (blocks - 1 if unit in exits else unit - 1) not in left
            elif unit == blocks - 1:
                assert not left & {unit, *exits}
            else:
                assert (0 if unit == "entry" else unit + 1) not in left
    everything = {(Stage.BACKWARD, unit) for unit in backward_units(blocks, microbatches)}
    assert gone == everything | {(Stage.FORWARD, unit) for unit in forward_units(blocks)}
