"""Claims about which shards a pass still has to visit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ledger import Recorded
from actors.messages import Shard, Stage, Unit
from actors.shards import Work, blocks_per_shard, remaining, units_of

NOTHING = Recorded(done=frozenset(), boundaries=frozenset())


@st.composite
def states(draw: st.DrawFn) -> tuple[int, Recorded, Recorded, int]:
    """Any set of records, also ones no run would leave."""
    blocks = draw(st.integers(1, 12))
    recorded = []
    for stage in Stage:
        units = st.sampled_from(units_of(stage, blocks))
        recorded.append(Recorded(done=draw(st.frozensets(units)), boundaries=draw(st.frozensets(units))))
    return blocks, recorded[0], recorded[1], draw(st.integers(1, 13))


@settings(max_examples=500)
@given(state=states())
def test_the_plan_makes_all_that_is_missing_from_what_is_there(
    state: tuple[int, Recorded, Recorded, int],
) -> None:
    blocks, forward, backward, limit = state
    work = remaining(blocks, forward, backward, limit=limit)
    there = {Stage.FORWARD: set(forward.boundaries), Stage.BACKWARD: set(backward.boundaries)}
    made: dict[Stage, list[Unit]] = {stage: [] for stage in Stage}
    for shard in (*work.forward, *work.backward):
        assert len(shard.units) <= limit or len(shard.units) == 1
        order = units_of(shard.stage, blocks)
        start = order.index(shard.units[0])
        assert order[start : start + len(shard.units)] == shard.units, "consecutive, in the order of the pass"
        assert shard.origin == (order[start - 1] if start else None)
        if shard.origin is not None:
            assert shard.origin in there[shard.stage], "its input is stored, or an earlier shard puts it out"
        if shard.stage is Stage.BACKWARD:
            below = _below(shard.units[-1], blocks)
            assert below in there[Stage.FORWARD], "the boundary it recomputes from"
        there[shard.stage].add(shard.units[-1])
        made[shard.stage] += shard.produce
    for stage, recorded in ((Stage.FORWARD, forward), (Stage.BACKWARD, backward)):
        missing = set(units_of(stage, blocks)) - recorded.done - {"entry"}
        assert sorted(map(str, made[stage])) == sorted(map(str, missing)), "every missing product once, no other"


def _below(unit: Unit, blocks: int) -> Unit:
    order = units_of(Stage.FORWARD, blocks)
    return order[-1] if unit == "exit" else order[order.index(unit) - 1]


def names(shards: tuple[Shard, ...]) -> list[str]:
    return [shard.name for shard in shards]


def test_a_first_run_visits_everything_in_shards_of_about_equal_size() -> None:
    work = remaining(7, NOTHING, NOTHING, limit=3)
    assert names(work.backward) == ["exit", "0006-0004", "0003-0002", "0001-0000"]
    # Cut where the backward pass will read, so that it finds a boundary below each of its shards.
    assert names(work.forward) == ["entry", "0000-0001", "0002-0003", "0004-0006"]


def test_nothing_is_left_of_a_finished_run() -> None:
    done = [Recorded(done=frozenset(units_of(stage, 5)), boundaries=frozenset()) for stage in Stage]
    assert remaining(5, *done, limit=2) == Work(forward=(), backward=())


def test_a_resumed_backward_pass_uses_the_boundaries_that_are_stored() -> None:
    forward = Recorded(done=frozenset(range(8)), boundaries=frozenset({"entry", 1, 3, 5, 7}))
    work = remaining(8, forward, NOTHING, limit=3)
    assert work.forward == ()
    assert names(work.backward) == ["exit", "0007-0006", "0005-0004", "0003-0002", "0001-0000"]


def test_one_damaged_candidate_costs_a_run_up_to_its_block_and_one_encoding() -> None:
    everything = [frozenset(units_of(stage, 6)) for stage in Stage]
    forward = Recorded(done=everything[0] - {3}, boundaries=frozenset())
    work = remaining(6, forward, Recorded(done=everything[1], boundaries=frozenset()), limit=2)
    assert names(work.forward) == ["entry", "0000-0001", "0002-0003"]
    assert [set(shard.produce) for shard in work.forward] == [set(), set(), {3}]
    assert work.backward == ()


def test_auto_shards_fill_memory_but_leave_every_worker_four_visits() -> None:
    assert blocks_per_shard(blocks=64, workers=2, fitting=100) == 8
    assert blocks_per_shard(blocks=64, workers=2, fitting=3) == 3
    assert blocks_per_shard(blocks=64, workers=100, fitting=3) == 1
    assert blocks_per_shard(blocks=64, workers=2, fitting=-5) == 1
