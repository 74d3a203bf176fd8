"""Claims about the shards that are left of a pass."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.schedule.pass_graph import PassGraph
from actors.schedule.run_store import Recorded
from actors.schedule.shards import (
    Work,
    blocks_per_shard,
    droppable_boundaries,
    droppable_evaluation_boundaries,
    pending_evaluation_shards,
    pending_shards,
)
from actors.schedule.units import PASSES, Exit, Shard, Stage, Unit, unit_key, unit_of

NOTHING = Recorded(done=frozenset(), boundaries=frozenset())


class Model:
    """What a graph stands for, said again in lists: which units there are, what reads what."""

    def __init__(self, graph: PassGraph) -> None:
        self.tower = list(range(graph.vision))
        self.decoder = list(range(graph.vision, graph.vision + graph.decoder))
        after = graph.vision + graph.decoder
        self.draft = [after] if graph.draft else []
        self.head = [after + graph.draft] if graph.head else []
        self.heads = [*self.draft, *self.head]
        self.blocks = [*self.tower, *self.decoder, *self.heads]
        self.texts = list(range(graph.texts))
        self.images = list(range(graph.texts, graph.texts + graph.images))
        self.exits = [Exit(microbatch) for microbatch in (*self.texts, *self.images)]
        #: maximal stretches of blocks that may share a shard
        self.stretches = [self.tower, self.decoder, *([head] for head in self.heads)]
        tower: list[Unit] = ["pixels", *self.tower] if self.tower else []
        #: the units of both passes, each behind what it reads
        self.order: dict[Stage, list[Unit]] = {
            Stage.FORWARD: [*tower, "entry", *self.decoder, *self.heads],
            Stage.BACKWARD: [*self.exits, *reversed([*self.tower, *self.decoder]), *self.heads],
        }
        #: those whose output something reads
        self.puts_out = {stage: [u for u in units if u not in self.heads] for stage, units in self.order.items()}

    def microbatches(self, unit: Unit) -> list[int]:
        if isinstance(unit, Exit):
            return [unit.microbatch]
        if unit == "pixels" or unit in self.tower:
            return self.images
        return self.texts if unit in self.draft else [*self.texts, *self.images]

    def below(self, unit: Unit) -> Unit:
        """What leaves this enters a block."""
        if unit in self.heads:
            return self.decoder[-1]
        if unit == self.decoder[0]:
            return "entry"
        return "pixels" if unit == 0 else unit - 1

    def origins(self, stage: Stage, unit: Unit) -> list[Unit]:
        """What a unit reads from the pass itself."""
        if unit == "pixels" or isinstance(unit, Exit):
            return []
        if unit == "entry":
            return self.tower[-1:]
        if stage is Stage.FORWARD:
            return [self.below(unit)]
        if unit in self.heads:
            return []
        return self.exits if unit == self.decoder[-1] else [unit + 1]

    def readers(self, stage: Stage, unit: Unit) -> set[Unit]:
        """The units of the backward pass that need what a unit of a pass has put out."""
        if stage is Stage.BACKWARD:
            return {other for other in self.order[Stage.BACKWARD] if unit in self.origins(stage, other)}
        found = {other for other in (*self.tower, *self.decoder, *self.heads) if self.below(other) == unit}
        return found | set(self.exits) | {unit} if unit == self.decoder[-1] else found


graphs = st.builds(
    lambda decoder, texts, tower, images, draft, head, mixtures: PassGraph(
        decoder=decoder,
        texts=texts,
        vision=tower,
        images=images if tower else 0,
        draft=draft,
        head=head,
        mixtures=frozenset(tower + block for block in mixtures if block < decoder),
    ),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([0, 0, 2, 3, 5]),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.sets(st.integers(0, 8)),
)


@given(graph=graphs)
def test_a_pass_graph_says_what_reads_what(graph: PassGraph) -> None:
    model = Model(graph)
    assert graph.blocks == len(model.blocks)
    assert (graph.first, graph.last) == (model.decoder[0], model.decoder[-1])
    assert list(graph.heads) == model.heads
    assert list(graph.exits) == model.exits
    assert list(graph.every) == [*model.texts, *model.images]
    assert graph.order(Stage.FORWARD) == model.order[Stage.FORWARD]
    assert [*graph.exits, *graph.order(Stage.BACKWARD)] == model.order[Stage.BACKWARD]
    for stage in PASSES:
        for unit in model.order[stage]:
            assert list(graph.reads(stage, unit)) == model.origins(stage, unit)
            assert list(graph.microbatches(unit)) == model.microbatches(unit)
            assert unit_of(unit_key(unit)) == unit
    for unit in model.blocks:
        assert graph.below(unit) == model.below(unit)
    for unit in model.puts_out[Stage.BACKWARD]:
        reader = graph.reader(unit)
        assert ({reader} if reader is not None else set()) == model.readers(Stage.BACKWARD, unit)
    for first in model.order[Stage.BACKWARD]:
        for second in model.order[Stage.BACKWARD]:
            together = any(first in stretch and second in stretch for stretch in model.stretches)
            assert graph.joined(first, second) is (together and first not in model.heads)
    assert set(graph.readers_of_last()) == model.readers(Stage.FORWARD, graph.last)


@st.composite
def states(draw: st.DrawFn) -> tuple[PassGraph, Recorded, Recorded, int]:
    """Any set of records, also ones no run would leave."""
    graph = draw(graphs)
    model = Model(graph)

    def some(units: list[Unit]) -> frozenset[Unit]:
        bits = draw(st.integers(0, 2 ** len(units) - 1))
        return frozenset(unit for place, unit in enumerate(units) if bits >> place & 1)

    forward, backward = (
        Recorded(done=some([*model.blocks]), boundaries=some(model.puts_out[stage]))
        for stage in (Stage.FORWARD, Stage.BACKWARD)
    )
    return graph, forward, backward, draw(st.integers(1, 10))


@settings(max_examples=500)
@given(state=states())
def test_the_plan_makes_all_that_is_missing_from_what_is_there(
    state: tuple[PassGraph, Recorded, Recorded, int],
) -> None:
    graph, forward, backward, limit = state
    model = Model(graph)
    work = pending_shards(graph, forward, backward, limit=limit)
    there = {Stage.FORWARD: set(forward.boundaries), Stage.BACKWARD: set(backward.boundaries)}
    made: dict[Stage, list[Unit]] = {stage: [] for stage in PASSES}
    for shard in (*work.forward, *work.backward):
        first, last = shard.units[0], shard.units[-1]
        assert len(shard.units) <= limit or len(shard.units) == 1
        for unit in shard.units:
            assert shard.microbatches == tuple(model.microbatches(unit))
        assert list(shard.origins) == model.origins(shard.stage, first)
        order = model.order[shard.stage]
        start = order.index(first)
        assert tuple(order[start : start + len(shard.units)]) == shard.units, "consecutive, in the order of the pass"
        if len(shard.units) > 1:
            assert any(set(shard.units) <= set(stretch) for stretch in model.stretches)
        if isinstance(first, Exit):
            assert graph.last in there[Stage.FORWARD], "the boundary it reads"
        assert set(shard.origins) <= there[shard.stage], "its input is stored, or an earlier shard puts it out"
        if shard.stage is Stage.BACKWARD and isinstance(last, int):
            assert model.below(last) in there[Stage.FORWARD], "the boundary it recomputes from"
        if last not in model.heads:
            there[shard.stage].add(last)
        made[shard.stage] += shard.produce
    for stage, recorded in ((Stage.FORWARD, forward), (Stage.BACKWARD, backward)):
        assert sorted(made[stage]) == sorted(set(model.blocks) - recorded.done), "every missing product once, no other"


@settings(max_examples=200)
@given(state=states())
def test_nothing_is_run_that_neither_produces_nor_is_needed(state: tuple[PassGraph, Recorded, Recorded, int]) -> None:
    graph, forward, backward, limit = state
    model = Model(graph)
    work = pending_shards(graph, forward, backward, limit=limit)
    planned = [(shard.stage, unit) for shard in (*work.forward, *work.backward) for unit in shard.units]
    assert len(planned) == len(set(planned)), "no unit twice"
    recomputed = {model.below(shard.units[-1]) for shard in work.backward if not isinstance(shard.units[0], Exit)}
    recomputed |= {graph.last for shard in work.backward if isinstance(shard.units[0], Exit)}
    for stage, recorded in ((Stage.FORWARD, forward), (Stage.BACKWARD, backward)):
        units = [unit for other, unit in planned if other is stage]
        for unit in units:
            read = any(unit in model.origins(stage, other) for other in units)
            produces = unit in model.blocks and unit not in recorded.done
            wanted = stage is Stage.FORWARD and unit in recomputed
            assert produces or ((read or wanted) and unit not in recorded.boundaries)


@st.composite
def evaluations(draw: st.DrawFn) -> tuple[PassGraph, Recorded, int]:
    """Any set of records of an evaluation; a model that sees may be given no images."""
    graph = draw(graphs)
    if draw(st.booleans()):
        graph = dataclasses.replace(graph, images=0)
    units = graph.order(Stage.EVALUATION)
    done, boundaries = (frozenset(draw(st.lists(st.sampled_from(units)))) for _ in range(2))
    unread = {*graph.exits, *graph.heads[: graph.draft]}
    return (
        graph,
        Recorded(done=done & (unread | graph.mixtures), boundaries=boundaries - unread),
        draw(st.integers(1, 10)),
    )


@settings(max_examples=300)
@given(state=evaluations())
def test_an_evaluation_goes_from_what_is_stored_to_every_figure_that_is_missing(
    state: tuple[PassGraph, Recorded, int],
) -> None:
    graph, recorded, limit = state
    model = Model(graph)
    sees = graph.vision > 0 and graph.images > 0
    there, figures, left = set(recorded.boundaries), [], []
    shards = pending_evaluation_shards(graph, recorded, limit=limit)
    for shard in shards:
        first, last = shard.units[0], shard.units[-1]
        assert len(shard.units) <= limit or len(shard.units) == 1
        if isinstance(first, Exit):
            origins: list[Unit] = [graph.last]
        elif first == "entry":
            origins = model.tower[-1:] if sees else []
        else:
            origins = [] if first == "pixels" else [model.below(first)]
        assert list(shard.origins) == origins
        assert set(origins) <= there, "its input is stored, or an earlier shard puts it out"
        assert sees or first not in ("pixels", *model.tower), "no image, no tower"
        there.add(last)
        figures += shard.produce
        left += shard.units
    wanted = {*model.exits, *model.draft, *graph.mixtures} - recorded.done
    assert set(figures) == wanted
    assert len(figures) == len(wanted)
    # A boundary goes when the last of its readers is done, never before.
    for place, shard in enumerate(shards):
        later = [unit for other in shards[place + 1 :] for unit in other.units]
        gone = {unit for _, unit in droppable_evaluation_boundaries(graph, shard.units, later)}
        needed = {origin for other in shards[place + 1 :] for origin in other.origins}
        assert not gone & needed
        assert set(shard.origins) <= gone | needed


def names(shards: tuple[Shard, ...]) -> list[str]:
    return [shard.name for shard in shards]


DENSE = PassGraph(decoder=7, texts=2)
SEEING = PassGraph(decoder=4, texts=2, vision=3, images=1, draft=True, head=True)


def test_a_first_run_visits_everything_in_shards_of_about_equal_size() -> None:
    work = pending_shards(DENSE, NOTHING, NOTHING, limit=3)
    assert names(work.backward) == ["exit-00000", "exit-00001", "0006-0004", "0003-0002", "0001-0000"]
    # Cut where the backward pass will read, so that it finds a boundary below each of its shards.
    assert names(work.forward) == ["entry", "0000-0001", "0002-0003", "0004-0006"]


def test_images_go_through_the_tower_first_and_draft_and_head_come_last_in_both_passes() -> None:
    work = pending_shards(SEEING, NOTHING, NOTHING, limit=2)
    assert names(work.forward) == ["pixels", "0000", "0001-0002", "entry", "0003-0004", "0005-0006", "0007", "0008"]
    exits = ["exit-00000", "exit-00001", "exit-00002"]
    assert names(work.backward) == [*exits, "0006-0005", "0004-0003", "0002-0001", "0000", "0007", "0008"]
    assert {shard.name: shard.microbatches for shard in work.forward} == {
        "pixels": (2,),
        "0000": (2,),
        "0001-0002": (2,),
        "entry": (0, 1, 2),
        "0003-0004": (0, 1, 2),
        "0005-0006": (0, 1, 2),
        "0007": (0, 1),
        "0008": (0, 1, 2),
    }
    origins = {shard.name: shard.origins for shard in (*work.forward, *work.backward)}
    assert origins["entry"] == (2,), "what the merger made of images"
    assert origins["0007"] == (), "a head of the backward pass has a loss of its own"


def test_nothing_is_left_of_a_finished_run() -> None:
    for graph in (DENSE, SEEING):
        done = Recorded(done=frozenset(range(graph.blocks)), boundaries=frozenset())
        assert pending_shards(graph, done, done, limit=2) == Work(forward=(), backward=())


def test_a_resumed_backward_pass_uses_the_boundaries_that_are_stored() -> None:
    graph = PassGraph(decoder=8, texts=2)
    forward = Recorded(done=frozenset(range(8)), boundaries=frozenset({"entry", 1, 3, 5, 7}))
    work = pending_shards(graph, forward, Recorded(done=frozenset(), boundaries=frozenset({Exit(0)})), limit=3)
    assert work.forward == ()
    assert names(work.backward) == ["exit-00001", "0007-0006", "0005-0004", "0003-0002", "0001-0000"]


def test_one_damaged_candidate_costs_a_run_up_to_its_block_and_one_encoding() -> None:
    done = Recorded(done=frozenset(range(6)), boundaries=frozenset())
    without = Recorded(done=done.done - {3}, boundaries=frozenset())
    work = pending_shards(PassGraph(decoder=6, texts=2), without, done, limit=2)
    assert names(work.forward) == ["entry", "0000-0001", "0002-0003"]
    assert [set(shard.produce) for shard in work.forward] == [set(), set(), {3}]
    assert work.backward == ()


def test_a_damaged_candidate_of_the_tower_or_of_a_leaf_costs_only_what_is_before_it() -> None:
    done = Recorded(done=frozenset(range(SEEING.blocks)), boundaries=frozenset())
    for unit, expected in (
        (1, ["pixels", "0000-0001"]),
        (8, ["pixels", "0000-0001", "0002", "entry", "0003-0004", "0005-0006", "0008"]),
    ):
        work = pending_shards(SEEING, Recorded(done=done.done - {unit}, boundaries=frozenset()), done, limit=2)
        assert names(work.forward) == expected
        assert work.backward == ()


def test_a_damaged_price_of_a_leaf_costs_no_gradient() -> None:
    stored = Recorded(done=frozenset(range(SEEING.blocks)), boundaries=frozenset({6}))
    work = pending_shards(SEEING, stored, Recorded(done=stored.done - {7}, boundaries=frozenset()), limit=2)
    assert (names(work.forward), names(work.backward)) == ([], ["0007"])


def test_auto_shards_fill_memory_but_leave_every_worker_four_visits() -> None:
    assert blocks_per_shard(blocks=64, workers=2, fitting=100) == 8
    assert blocks_per_shard(blocks=64, workers=2, fitting=3) == 3
    assert blocks_per_shard(blocks=64, workers=100, fitting=3) == 1
    assert blocks_per_shard(blocks=64, workers=2, fitting=-5) == 1


@settings(max_examples=300)
@given(graph=graphs, chance=st.randoms(use_true_random=False))
def test_boundaries_go_when_producer_and_consumer_are_done_and_all_of_them_go(graph: PassGraph, chance: Any) -> None:
    model = Model(graph)
    order = [*model.order[Stage.BACKWARD]]
    chance.shuffle(order)  # units finish in any order that a lossy cluster makes up
    left = set(order)
    gone: set[tuple[Stage, Unit]] = set()
    while order:
        finished = [order.pop() for _ in range(min(len(order), chance.randint(1, 3)))]
        left -= set(finished)
        gone |= set(droppable_boundaries(graph, finished, left))
        for stage, unit in gone:
            if stage is Stage.BACKWARD:
                assert unit not in left
            assert not left & model.readers(stage, unit)
    assert gone == {(stage, unit) for stage in PASSES for unit in model.puts_out[stage]}
