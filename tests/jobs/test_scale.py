"""Claims about what the driver takes as models and clusters grow: counted, not timed. Figures: benchmarks/driver.py."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.schedule.pass_graph import PassGraph
from actors.schedule.run_store import Recorded
from actors.schedule.shards import (
    droppable_boundaries,
    droppable_evaluation_boundaries,
    pending_evaluation_shards,
    pending_shards,
)
from actors.schedule.units import PASSES, Stage, Unit
from benchmarks.simulation import Cost, Durations, whole_run
from jobs.commands import status
from jobs.pipeline.inspection import inspect
from prismaquant_ray.attempts import busy_shares, pass_attempts
from prismaquant_ray.config import Config
from prismaquant_ray.event_log import EventLog
from prismaquant_ray.events import Event, ShardDone, StepDone, read_events
from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint
from prismaquant_ray.model.layout_builder import build_layout
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.counting import operations
from tests.large import dense, measured_run, mixture
from tests.runs import configuration
from tests.virtual import conducted_run

LAYERS = (12, 24)
#: Twice as much of a model may take this much more: some of it is done once for all.
TWICE = 2.1
EVEN = Durations(
    entry=Cost(microbatch=1.0),
    forward=Cost(microbatch=1.0, finish=2.0),
    exit=Cost(microbatch=1.0),
    backward=Cost(microbatch=1.0, finish=1.0),
)
NOTHING = Recorded(done=frozenset(), boundaries=frozenset())


def passes(blocks: int, microbatches: int, workers: int, log: Callable[[Event], None] = lambda _: None) -> int:
    """Operations of the controller, and of whoever listens, for both passes of a model."""
    work = whole_run(blocks, microbatches, 1)
    return operations(lambda: conducted_run(work, EVEN, workers, log))


def test_an_event_takes_the_controller_the_same_whatever_the_model_s_size() -> None:
    assert passes(80, 4, 8) <= TWICE * passes(40, 4, 8)
    assert passes(20, 16, 8) <= TWICE * passes(20, 8, 8)


def test_an_event_takes_the_controller_hardly_more_with_twice_the_workers() -> None:
    # A run asks for no more workers than it has microbatches.
    assert passes(64, 16, 16) <= 1.2 * passes(64, 16, 8)


def planned(blocks: int) -> Mapping[str, int]:
    """Operations of planning every pass of a model, and of saying after each of its shards what can go."""
    graph = PassGraph(decoder=blocks, texts=4)
    counts = Counter[str]()
    # Every third output is stored, and a part of the units is done.
    stored = Recorded(done=frozenset(range(0, blocks, 5)), boundaries=frozenset({"entry", *range(0, blocks, 3)}))
    for name, recorded in (("first", NOTHING), ("resumed", stored)):
        counts[name] = operations(lambda recorded=recorded: pending_shards(graph, recorded, NOTHING, limit=2))
    counts["evaluation"] = operations(lambda: pending_evaluation_shards(graph, NOTHING, limit=2))
    for stage, drop in ((Stage.BACKWARD, droppable_boundaries), (Stage.EVALUATION, droppable_evaluation_boundaries)):
        left: set[Unit] = {*graph.order(stage)}

        def dropped(left: set[Unit] = left, drop: Callable[..., Any] = drop) -> None:
            for unit in list(left):
                left.remove(unit)
                drop(graph, [unit], left)

        counts[f"dropped in {stage}"] = operations(dropped)
    return counts


def test_planning_grows_with_the_blocks() -> None:
    once, twice = planned(150), planned(300)
    assert {name: twice[name] / once[name] for name in once if twice[name] > TWICE * once[name]} == {}


# The log ------------------------------------------------------------------------------------------------------------


class Kept:
    """A log that is written after every event, and the most that was written at once."""

    def __init__(self, store: Store) -> None:
        self.store, self.log, self.most = store, EventLog(store), 0
        self.told: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.told.append(event)
        self.log(event)
        if len(self.told) % 50 == 0:
            self.log.flush()
            self.most = max(self.most, self.store.size("events.jsonl") or 0)


def kept(directory: Path, blocks: int, microbatches: int, workers: int = 4) -> Kept:
    found = Kept(Store(directory))
    conducted_run(whole_run(blocks, microbatches, 1), EVEN, workers, found)
    found.log.flush()
    return found


def test_the_log_grows_with_shards_and_not_with_steps(tmp_path: Path) -> None:
    few, many = kept(tmp_path / "few", 24, 4), kept(tmp_path / "many", 24, 32)
    sizes = [found.store.size("events.jsonl") for found in (few, many)]
    lines = [len(read_events(found.store)) for found in (few, many)]
    assert lines[1] - lines[0] == 2 * (32 - 4), "an exit is a shard of its own: two lines"
    assert sizes[1] is not None and sizes[0] is not None
    steps = sum(isinstance(event, StepDone) for event in many.told)
    everything = sum(len(event.line()) + 1 for event in many.told)
    assert steps > 1500
    assert sizes[1] < everything / 6
    # Before its shard is done a step has a line of its own: one for each of four workers' microbatches.
    step = next(event for event in many.told if isinstance(event, StepDone))
    assert many.most < sizes[1] + 4 * 33 * 1.2 * len(step.line())


def test_a_killed_driver_s_steps_are_summed_by_the_next_one(tmp_path: Path) -> None:
    whole = kept(tmp_path / "whole", 6, 4)
    cut = len(whole.told) // 3
    store = Store(tmp_path / "cut")
    # As versions before wrote it: every step a line.
    store.put("events.jsonl", b"".join(event.line().encode() + b"\n" for event in whole.told[:cut]))
    log = EventLog(store)
    log.flush()
    events = read_events(store)
    assert not [event for event in events if isinstance(event, StepDone)]
    finished = [event for event in whole.told[:cut] if isinstance(event, ShardDone)]
    assert [event for event in events if isinstance(event, ShardDone)] == finished
    steps = sum(isinstance(event, StepDone) for event in whole.told[:cut])
    assert sum(event.steps for event in events if event.event == "steps") == steps


def test_busy_shares_are_those_of_the_steps(tmp_path: Path) -> None:
    uneven = replace(EVEN, backward=Cost(load=3.0, microbatch=1.5, finish=0.5), hop=0.3, call=0.1)
    found = Kept(Store(tmp_path))
    conducted_run(whole_run(40, 12, 1), uneven, 6, found)
    found.log.flush()
    for attempt in pass_attempts(read_events(found.store)):
        stage = attempt.began.stage
        exact = busy_shares([step for step in found.told if isinstance(step, StepDone) and step.stage == stage])
        assert busy_shares(attempt.work) == pytest.approx(exact, abs=0.02)
        assert len(exact) == 6


# Commands -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Config]:
    """Measured runs of a dense model of so many layers."""
    directory = tmp_path_factory.mktemp("scale")
    return {n: measured_run(directory / str(n), dense(directory / f"source-{n}", n)) for n in LAYERS}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib, which takes most of the time and is not the product's."""
    monkeypatch.setattr("jobs.pipeline.reporting.find_spec", lambda _: None)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", ["inspect", "allocate", "sweep", "report"])
def test_a_command_grows_with_the_layers(runs: dict[int, Config], name: str) -> None:
    module = importlib.import_module(f"jobs.commands.{name}")
    for config in runs.values():
        module.run(config)  # caches, which are filled once, are no growth
    once, twice = (operations(lambda config=config: module.run(config)) for config in runs.values())
    assert once < twice < TWICE * once


def test_inspect_grows_with_the_experts(tmp_path: Path) -> None:
    found = []
    for experts in (16, 32):
        config = configuration(tmp_path / str(experts), mixture(tmp_path / f"source-{experts}", 2, experts))
        inspect(config)
        found.append(operations(lambda config=config: inspect(config)))
    assert found[1] < TWICE * found[0]


def test_a_layout_grows_with_a_tower_that_is_not_measured(tmp_path: Path, families: Mapping[str, Path]) -> None:
    found = []
    for depth in (24, 48):
        body = json.loads((families["qwen3_5"] / "config.json").read_text())
        body["vision_config"]["depth"] = depth
        (tmp_path / "config.json").write_text(json.dumps(body))
        checkpoint = ConfigOnlyCheckpoint(Store(tmp_path))
        found.append(operations(lambda checkpoint=checkpoint: build_layout(checkpoint)))
    assert found[0] < found[1] < TWICE * found[0]


def test_a_fingerprint_holds_few_samples_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint(Store(mixture(tmp_path / "source", 3, 16)))
    whole, most = source.fingerprint(), 0
    get = Store.get_ranges

    def counted(self: Store, key: str, ranges: Sequence[tuple[int, int]]) -> Any:
        nonlocal most
        most = max(most, sum(stop - start for start, stop in ranges))
        return get(self, key, ranges)

    monkeypatch.setattr(Store, "get_ranges", counted)
    monkeypatch.setattr("prismaquant_ray.source.checkpoint._SAMPLED_AT_ONCE", 7)
    assert source.fingerprint() == whole
    assert 0 < most <= 7 * 2 * 4096


@pytest.mark.usefixtures("plain")
def test_requests_are_two_a_block_and_for_status_none(runs: dict[int, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counter[str]()
    repeat = Store._repeat

    def counted(self: Store, *arguments: Any, **more: Any) -> Any:
        asked["requests"] += 1
        return repeat(self, *arguments, **more)

    monkeypatch.setattr(Store, "_repeat", counted)
    found: dict[str, list[int]] = {}
    for name in ("allocate", "sweep", "status", "report"):
        for config in runs.values():
            asked.clear()
            if name == "status":
                status.run(str(config.store.run))
            else:
                importlib.import_module(f"jobs.commands.{name}").run(config)
            found.setdefault(name, []).append(asked["requests"])
    more = len(PASSES) * (LAYERS[1] - LAYERS[0])
    grown = {name: counts[1] - counts[0] for name, counts in found.items()}
    assert grown == {"allocate": more, "sweep": more, "status": 0, "report": more}
