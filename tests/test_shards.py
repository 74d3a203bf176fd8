"""Claims about which shards a pass still has to visit."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.course import Course
from actors.ledger import Recorded
from actors.messages import PASSES, Exit, Shard, Stage, Unit, unit_key, unit_of
from actors.shards import Work, blocks_per_shard, consumed, remaining, spent, unevaluated

NOTHING = Recorded(done=frozenset(), boundaries=frozenset())


class Model:
    """What a course stands for, said again in lists: which units there are, what reads what."""

    def __init__(self, course: Course) -> None:
        self.tower = list(range(course.vision))
        self.decoder = list(range(course.vision, course.vision + course.decoder))
        after = course.vision + course.decoder
        self.draft = [after] if course.draft else []
        self.head = [after + course.draft] if course.head else []
        self.leaves = [*self.draft, *self.head]
        self.blocks = [*self.tower, *self.decoder, *self.leaves]
        self.texts = list(range(course.texts))
        self.images = list(range(course.texts, course.texts + course.images))
        self.exits = [Exit(microbatch) for microbatch in (*self.texts, *self.images)]
        #: maximal stretches of blocks that may be visited together
        self.stretches = [self.tower, self.decoder, *([leaf] for leaf in self.leaves)]
        tower: list[Unit] = ["pixels", *self.tower] if self.tower else []
        #: the units of both passes, each behind what it reads
        self.order: dict[Stage, list[Unit]] = {
            Stage.FORWARD: [*tower, "entry", *self.decoder, *self.leaves],
            Stage.BACKWARD: [*self.exits, *reversed([*self.tower, *self.decoder]), *self.leaves],
        }
        #: those whose output something reads
        self.puts_out = {stage: [u for u in units if u not in self.leaves] for stage, units in self.order.items()}

    def microbatches(self, unit: Unit) -> list[int]:
        if isinstance(unit, Exit):
            return [unit.microbatch]
        if unit == "pixels" or unit in self.tower:
            return self.images
        return self.texts if unit in self.draft else [*self.texts, *self.images]

    def below(self, unit: Unit) -> Unit:
        """What leaves this enters a block."""
        if unit in self.leaves:
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
        if unit in self.leaves:
            return []
        return self.exits if unit == self.decoder[-1] else [unit + 1]

    def readers(self, stage: Stage, unit: Unit) -> set[Unit]:
        """The units of the backward pass that need what a unit of a pass has put out."""
        if stage is Stage.BACKWARD:
            return {other for other in self.order[Stage.BACKWARD] if unit in self.origins(stage, other)}
        found = {other for other in (*self.tower, *self.decoder, *self.leaves) if self.below(other) == unit}
        return found | set(self.exits) | {unit} if unit == self.decoder[-1] else found


courses = st.builds(
    lambda decoder, texts, tower, images, draft, head: Course(
        decoder=decoder, texts=texts, vision=tower, images=images if tower else 0, draft=draft, head=head
    ),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([0, 0, 2, 3, 5]),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)


@given(course=courses)
def test_a_course_says_what_reads_what(course: Course) -> None:
    model = Model(course)
    assert course.blocks == len(model.blocks)
    assert (course.first, course.last) == (model.decoder[0], model.decoder[-1])
    assert list(course.leaves) == model.leaves
    assert list(course.exits) == model.exits
    assert list(course.every) == [*model.texts, *model.images]
    assert course.order(Stage.FORWARD) == model.order[Stage.FORWARD]
    assert [*course.exits, *course.order(Stage.BACKWARD)] == model.order[Stage.BACKWARD]
    for stage in PASSES:
        for unit in model.order[stage]:
            assert list(course.reads(stage, unit)) == model.origins(stage, unit)
            assert list(course.microbatches(unit)) == model.microbatches(unit)
            assert unit_of(unit_key(unit)) == unit
    for unit in model.blocks:
        assert course.below(unit) == model.below(unit)
    for unit in model.puts_out[Stage.BACKWARD]:
        reader = course.reader(unit)
        assert ({reader} if reader is not None else set()) == model.readers(Stage.BACKWARD, unit)
    for first in model.order[Stage.BACKWARD]:
        for second in model.order[Stage.BACKWARD]:
            together = any(first in stretch and second in stretch for stretch in model.stretches)
            assert course.joined(first, second) is (together and first not in model.leaves)
    assert set(course.readers_of_last()) == model.readers(Stage.FORWARD, course.last)


@st.composite
def states(draw: st.DrawFn) -> tuple[Course, Recorded, Recorded, int]:
    """Any set of records, also ones no run would leave."""
    course = draw(courses)
    model = Model(course)

    def some(units: list[Unit]) -> frozenset[Unit]:
        bits = draw(st.integers(0, 2 ** len(units) - 1))
        return frozenset(unit for place, unit in enumerate(units) if bits >> place & 1)

    forward, backward = (
        Recorded(done=some([*model.blocks]), boundaries=some(model.puts_out[stage]))
        for stage in (Stage.FORWARD, Stage.BACKWARD)
    )
    return course, forward, backward, draw(st.integers(1, 10))


@settings(max_examples=500)
@given(state=states())
def test_the_plan_makes_all_that_is_missing_from_what_is_there(state: tuple[Course, Recorded, Recorded, int]) -> None:
    course, forward, backward, limit = state
    model = Model(course)
    work = remaining(course, forward, backward, limit=limit)
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
            assert course.last in there[Stage.FORWARD], "the boundary it reads"
        assert set(shard.origins) <= there[shard.stage], "its input is stored, or an earlier shard puts it out"
        if shard.stage is Stage.BACKWARD and isinstance(last, int):
            assert model.below(last) in there[Stage.FORWARD], "the boundary it recomputes from"
        if last not in model.leaves:
            there[shard.stage].add(last)
        made[shard.stage] += shard.produce
    for stage, recorded in ((Stage.FORWARD, forward), (Stage.BACKWARD, backward)):
        assert sorted(made[stage]) == sorted(set(model.blocks) - recorded.done), "every missing product once, no other"


@settings(max_examples=200)
@given(state=states())
def test_nothing_is_run_that_neither_produces_nor_is_needed(state: tuple[Course, Recorded, Recorded, int]) -> None:
    course, forward, backward, limit = state
    model = Model(course)
    work = remaining(course, forward, backward, limit=limit)
    visited = [(shard.stage, unit) for shard in (*work.forward, *work.backward) for unit in shard.units]
    assert len(visited) == len(set(visited)), "no unit twice"
    recomputed = {model.below(shard.units[-1]) for shard in work.backward if not isinstance(shard.units[0], Exit)}
    recomputed |= {course.last for shard in work.backward if isinstance(shard.units[0], Exit)}
    for stage, recorded in ((Stage.FORWARD, forward), (Stage.BACKWARD, backward)):
        units = [unit for other, unit in visited if other is stage]
        for unit in units:
            read = any(unit in model.origins(stage, other) for other in units)
            produces = unit in model.blocks and unit not in recorded.done
            wanted = stage is Stage.FORWARD and unit in recomputed
            assert produces or ((read or wanted) and unit not in recorded.boundaries)


@st.composite
def evaluations(draw: st.DrawFn) -> tuple[Course, Recorded, int]:
    """Any set of records of an evaluation; a model that sees may be given no images."""
    course = draw(courses)
    if draw(st.booleans()):
        course = dataclasses.replace(course, images=0)
    units = course.order(Stage.EVALUATION)
    done, boundaries = (frozenset(draw(st.lists(st.sampled_from(units)))) for _ in range(2))
    products = {*course.exits, *course.leaves[: course.draft]}
    return course, Recorded(done=done & products, boundaries=boundaries - products), draw(st.integers(1, 10))


@settings(max_examples=300)
@given(state=evaluations())
def test_an_evaluation_goes_from_what_is_stored_to_every_figure_that_is_missing(
    state: tuple[Course, Recorded, int],
) -> None:
    course, recorded, limit = state
    model = Model(course)
    sees = course.vision > 0 and course.images > 0
    there, figures, left = set(recorded.boundaries), [], []
    shards = unevaluated(course, recorded, limit=limit)
    for shard in shards:
        first, last = shard.units[0], shard.units[-1]
        assert len(shard.units) <= limit or len(shard.units) == 1
        if isinstance(first, Exit):
            origins: list[Unit] = [course.last]
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
    wanted = {*model.exits, *model.draft} - recorded.done
    assert set(figures) == wanted
    assert len(figures) == len(wanted)
    # A boundary goes when the last of its readers is done, never before.
    for place, shard in enumerate(shards):
        later = [unit for other in shards[place + 1 :] for unit in other.units]
        gone = {unit for _, unit in consumed(course, shard.units, later)}
        needed = {origin for other in shards[place + 1 :] for origin in other.origins}
        assert not gone & needed
        assert set(shard.origins) <= gone | needed


def names(shards: tuple[Shard, ...]) -> list[str]:
    return [shard.name for shard in shards]


DENSE = Course(decoder=7, texts=2)
SEEING = Course(decoder=4, texts=2, vision=3, images=1, draft=True, head=True)


def test_a_first_run_visits_everything_in_shards_of_about_equal_size() -> None:
    work = remaining(DENSE, NOTHING, NOTHING, limit=3)
    assert names(work.backward) == ["exit-00000", "exit-00001", "0006-0004", "0003-0002", "0001-0000"]
    # Cut where the backward pass will read, so that it finds a boundary below each of its shards.
    assert names(work.forward) == ["entry", "0000-0001", "0002-0003", "0004-0006"]


def test_images_go_through_the_tower_first_and_draft_and_head_come_last_in_both_passes() -> None:
    work = remaining(SEEING, NOTHING, NOTHING, limit=2)
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
    assert origins["0007"] == (), "a leaf of the backward pass has a loss of its own"


def test_nothing_is_left_of_a_finished_run() -> None:
    for course in (DENSE, SEEING):
        done = Recorded(done=frozenset(range(course.blocks)), boundaries=frozenset())
        assert remaining(course, done, done, limit=2) == Work(forward=(), backward=())


def test_a_resumed_backward_pass_uses_the_boundaries_that_are_stored() -> None:
    course = Course(decoder=8, texts=2)
    forward = Recorded(done=frozenset(range(8)), boundaries=frozenset({"entry", 1, 3, 5, 7}))
    work = remaining(course, forward, Recorded(done=frozenset(), boundaries=frozenset({Exit(0)})), limit=3)
    assert work.forward == ()
    assert names(work.backward) == ["exit-00001", "0007-0006", "0005-0004", "0003-0002", "0001-0000"]


def test_one_damaged_candidate_costs_a_run_up_to_its_block_and_one_encoding() -> None:
    done = Recorded(done=frozenset(range(6)), boundaries=frozenset())
    without = Recorded(done=done.done - {3}, boundaries=frozenset())
    work = remaining(Course(decoder=6, texts=2), without, done, limit=2)
    assert names(work.forward) == ["entry", "0000-0001", "0002-0003"]
    assert [set(shard.produce) for shard in work.forward] == [set(), set(), {3}]
    assert work.backward == ()


def test_a_damaged_candidate_of_the_tower_or_of_a_leaf_costs_only_what_is_before_it() -> None:
    done = Recorded(done=frozenset(range(SEEING.blocks)), boundaries=frozenset())
    for unit, expected in (
        (1, ["pixels", "0000-0001"]),
        (8, ["pixels", "0000-0001", "0002", "entry", "0003-0004", "0005-0006", "0008"]),
    ):
        work = remaining(SEEING, Recorded(done=done.done - {unit}, boundaries=frozenset()), done, limit=2)
        assert names(work.forward) == expected
        assert work.backward == ()


def test_a_damaged_price_of_a_leaf_costs_no_gradient() -> None:
    stored = Recorded(done=frozenset(range(SEEING.blocks)), boundaries=frozenset({6}))
    work = remaining(SEEING, stored, Recorded(done=stored.done - {7}, boundaries=frozenset()), limit=2)
    assert (names(work.forward), names(work.backward)) == ([], ["0007"])


def test_auto_shards_fill_memory_but_leave_every_worker_four_visits() -> None:
    assert blocks_per_shard(blocks=64, workers=2, fitting=100) == 8
    assert blocks_per_shard(blocks=64, workers=2, fitting=3) == 3
    assert blocks_per_shard(blocks=64, workers=100, fitting=3) == 1
    assert blocks_per_shard(blocks=64, workers=2, fitting=-5) == 1


@settings(max_examples=300)
@given(course=courses, chance=st.randoms(use_true_random=False))
def test_boundaries_go_when_producer_and_consumer_are_done_and_all_of_them_go(course: Course, chance: Any) -> None:
    model = Model(course)
    order = [*model.order[Stage.BACKWARD]]
    chance.shuffle(order)  # units finish in any order that a lossy cluster makes up
    left = set(order)
    gone: set[tuple[Stage, Unit]] = set()
    while order:
        finished = [order.pop() for _ in range(min(len(order), chance.randint(1, 3)))]
        left -= set(finished)
        gone |= set(spent(course, finished, left))
        for stage, unit in gone:
            if stage is Stage.BACKWARD:
                assert unit not in left
            assert not left & model.readers(stage, unit)
    assert gone == {(stage, unit) for stage in PASSES for unit in model.puts_out[stage]}
