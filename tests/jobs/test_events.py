"""Claims about what a run says: its log, its progress, and `status` from the store alone."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from jobs.commands import status
from jobs.commands.progress import RunProgress, UploadProgress, run_progress, upload_progress
from jobs.pipeline.run import Run
from prismaquant_ray.attempts import busy_shares
from prismaquant_ray.errors import InputError
from prismaquant_ray.event_log import EventLog
from prismaquant_ray.events import (
    Events,
    Notice,
    PassBegan,
    RunBegan,
    RunEnded,
    ShardDone,
    StepDone,
    Waiting,
    WorkerLost,
    read_events,
)
from prismaquant_ray.serialization import to_json
from prismaquant_ray.storage.store import Store
from tests.inprocess import after, in_process
from tests.runs import assembled, configuration
from tests.tiny import make_checkpoint


def step(worker: str, started: float, seconds: float, **more: Any) -> StepDone:
    body: dict[str, Any] = {"stage": "forward", "shard": "0000-0001", "units": 2, "microbatch": 0, "peak_bytes": 0}
    return StepDone(at=started + seconds, worker=worker, started=started, seconds=seconds, **{**body, **more})


def began(stage: str = "forward", steps: int = 4) -> PassBegan:
    return PassBegan(at=0.0, stage=stage, shards=2, units=4, produced=4, microbatches=2, steps=steps)


SHARD = ShardDone(
    at=1.0, stage="forward", shard="0000-0001", units=["0000", "0001"], worker="worker-0", produced=2, left=1
)
LOST = WorkerLost(at=1.0, worker="worker-1", cause="its node is gone", shard="forward 0002", message="")


def test_the_log_continues_where_a_former_driver_stopped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    told = [RunBegan(at=float(number), workers=number + 1) for number in range(2)]
    for event in told:
        log = EventLog(store)
        Events(log)(event)
        log.flush()
    assert read_events(store) == told
    assert read_events(Store(tmp_path / "empty")) == []


def test_lines_of_the_log_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    began, ended = RunBegan(at=1.0, workers=1), RunEnded(at=2.0, how="measured")
    no_time = '{"at": NaN, "event": "end", "how": ""}'
    for line in ('{"at": 1.0, "ev', '{"at": 1.0, "event": "dinner"}', '{"at": 1.0, "event": "end"}', no_time, "[" * 99):
        store.put("events.jsonl", f"{began.line()}\n{line}\n\n{line}".encode())
        assert read_events(store) == [began]
        log = EventLog(store)
        log(ended)
        log.flush()
        assert read_events(store) == [began, ended]
        assert store.get("events.jsonl") == f"{began.line()}\n{ended.line()}\n".encode()


def test_every_event_comes_back_as_it_was_said(tmp_path: Path) -> None:
    told = [began(), LOST, step("worker-0", 1.0, 2.0, tokens=3, loss=0.5), step("worker-0", 1.0, 2.0, microbatch=None)]
    log = EventLog(Store(tmp_path))
    for event in (Notice(message="for people"), *told):
        log(event)
    log.flush()
    assert read_events(Store(tmp_path)) == told, "a notice is not kept"
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["pass", "lost", "step", "step"]
    assert "loss" not in lines[3], "a figure that a step does not have is left out"


def test_what_is_waited_for_is_in_the_log_until_something_comes(tmp_path: Path) -> None:
    store, awaited = (
        Store(tmp_path),
        [Waiting(at=seconds, message=f"nothing new for {seconds} s") for seconds in (10.0, 20.0)],
    )
    first = began()
    log = EventLog(store)
    for event in (first, *awaited):
        log(event)
        log.flush()
    assert read_events(store) == [first, awaited[1]]
    # The next driver goes on from there.
    log = EventLog(store)
    log.flush()
    assert read_events(store) == [first, awaited[1]]
    log(LOST)
    log.flush()
    assert read_events(store) == [first, LOST]


def test_busy_share_counts_between_fill_and_drain_only() -> None:
    # a works from 0 to 10 with a pause of 2; b begins at 2 and ends at 12.
    steps = [step("a", 0, 4), step("a", 6, 4), step("b", 2, 10)]
    assert busy_shares(steps) == {"a": pytest.approx(6 / 8), "b": pytest.approx(1.0)}
    # Both share the exit before it: that is not the pipeline's fill.
    exits = [step("a", -3, 1, shard="exit-00000"), step("b", -3, 1, shard="exit-00001")]
    assert busy_shares([*exits, *steps]) == busy_shares(steps)
    assert busy_shares([]) == {}
    assert busy_shares([step("a", 0, 1), step("b", 5, 1)]) == {}


def test_a_log_shows_blocks_rate_bytes_eta_and_who_does_what() -> None:
    text = io.StringIO()
    shown = RunProgress(Console(file=text, width=200), None)
    shown(began())
    shown(step("worker-0", 0, 1, tokens=64, hop_bytes=2_000_000))
    shown(SHARD)
    shown(LOST)
    line, lost = text.getvalue().splitlines()
    assert line.startswith("forward 2/4  ")
    assert "token-blocks/s" in line
    assert "2.0 MB moved" in line
    assert "ETA" in line
    assert "[worker-0 0000-0001 at 1]" in line
    assert lost == "lost worker-1: its node is gone; forward 0002 is run again"


def bars(console: Console) -> Bars:
    """Bars that are drawn only when they are asked for: their own thread would draw at any time."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} {task.total}")
    return Bars(*columns, console=console, auto_refresh=False)


def screen(text: io.StringIO, shown: Bars) -> list[str]:
    """The lines that a terminal shows last, without colours."""
    shown.refresh()
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).splitlines()]


def test_a_terminal_shows_a_bar_of_the_pass_and_a_line_of_every_worker() -> None:
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    with bars(console) as drawn:
        shown = RunProgress(console, drawn)
        shown(began(steps=6))
        shown(step("worker-0", 0, 1, tokens=64, hop_bytes=2_000_000))
        shown(step("worker-1", 0, 1, tokens=64, microbatch=None))
        forward = [(task.description, task.completed, task.total) for task in drawn.tasks]
        assert forward == [
            ("forward", 2, 6),
            ("  worker-0 0000-0001 at 1", 0, None),
            ("  worker-1 0000-0001 finished", 0, None),
        ]
        assert "2.0 MB moved" in drawn.tasks[0].fields["rate"]
        assert any(line.startswith("forward") and line.endswith(" 2 6") for line in screen(text, drawn))
        shown(SHARD)
        assert "ETA" in drawn.tasks[0].fields["rate"]
        shown(LOST)
        assert [task.description for task in drawn.tasks] == ["forward", "  worker-0 0000-0001 at 1"]
        assert "lost worker-1: its node is gone; forward 0002 is run again" in screen(text, drawn)
        shown(replace(LOST, shard=None))
        shown(began("backward", steps=5))
        assert [(task.description, task.completed, task.total) for task in drawn.tasks] == [("backward", 0, 5)]


def test_a_terminal_shows_what_is_published_in_a_bar_of_bytes() -> None:
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    with bars(console) as drawn:
        shown = UploadProgress(console, drawn)
        shown.begin("reading", 3, 5_000_000)
        shown.advance(2_000_000)
        assert [(t.description, t.completed, t.total) for t in drawn.tasks] == [
            ("reading 3 files, 5.0 MB", 2_000_000, 5_000_000)
        ]
        shown.done("a.safetensors", "read", 2_000_000)
        assert any(line.startswith("a.safetensors read: 2.0 MB in ") for line in screen(text, drawn))
        shown.begin("sending", 2, 4_000_000)
        assert [(t.description, t.completed) for t in drawn.tasks] == [("sending 2 files, 4.0 MB", 0)]
        assert any(line.endswith(" 0 4000000") for line in screen(text, drawn))


def test_bars_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        made = Console(file=io.StringIO(), force_terminal=terminal)
        monkeypatch.setattr("rich.console.Console", lambda made=made, **_: made)
        with run_progress() as of_a_run:
            assert (of_a_run.bars is not None) == terminal
        with upload_progress() as of_a_publication:
            assert (of_a_publication.bars is not None) == terminal


def test_status_tells_a_stopped_run_from_a_finished_one(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", layers=3)
    config = configuration(tmp_path, source, "cluster.blocks_per_shard=1")
    with pytest.raises(KeyboardInterrupt):
        Run(config, open_workers=in_process(2, after(11))).measure()
    stopped = status.run(str(config.store.run))
    assert stopped.state == "stopped; the same command continues"
    log = EventLog(Store(config.store.run))
    log(Waiting(message="nothing new for 30 s; under way: worker-0 on here"))
    log.flush()
    waiting = io.StringIO()
    status.render(status.run(str(config.store.run)), Console(file=waiting, width=160))
    assert "nothing new for 30 s; under way: worker-0 on here" in waiting.getvalue()
    assert 0 < stopped.blocks.encoded < 3
    assert stopped.blocks.total == 3
    run = Run(config, open_workers=in_process(2))
    run.measure()
    assembled(run)
    finished = status.run(str(config.store.run))
    assert finished.state == "measured"
    assert to_json(finished.blocks) == {"encoded": 3, "priced": 3, "total": 3}
    assert finished.stages[-1].stage == "backward"
    assert finished.repositories[0].uri == str(config.store.output)
    assert json.loads(json.dumps(to_json(finished))) == to_json(finished)
    shown = io.StringIO()
    status.render(finished, Console(file=shown, width=160))
    assert "3 of 3 encoded, 3 of 3 priced" in shown.getvalue()


def test_status_of_what_is_no_run_store_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="is not a run store"):
            status.run(str(place))
