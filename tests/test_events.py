"""Claims about what a run says: its log, its progress, and `status` from the store alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from actors.events import Event, EventLog, Events, busy_shares, read_events
from actors.progress import Progress
from jobs import assemble, planning, status
from jobs.run import Run
from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.storage.store import Store
from tests.inprocess import after, in_process
from tests.test_pipeline import configuration
from tests.tiny import make_checkpoint


def step(worker: str, started: float, seconds: float, **facts: object) -> Event:
    body = {
        "worker": worker,
        "started": started,
        "seconds": seconds,
        "stage": "forward",
        "shard": "0000-0001",
        "units": 2,
    }
    return Event(kind="step", at=started + seconds, payload={**body, "microbatch": 0, **facts})


def test_the_log_continues_where_a_former_driver_stopped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(2):
        log = EventLog(store)
        Events(log)("begin", number=number)
        log.flush()
    assert [(event.kind, event.payload) for event in read_events(store)] == [
        ("begin", {"number": 0}),
        ("begin", {"number": 1}),
    ]
    assert read_events(Store(tmp_path / "empty")) == []
    store.put("events.jsonl", b"{")
    with pytest.raises(StoreError, match="only a log"):
        read_events(store)


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
    shown = Progress(Console(file=text, width=200), None)
    facts = {"stage": "forward", "shards": 2, "units": 4, "produced": 4, "microbatches": 1, "steps": 4}
    shown(Event(kind="pass", at=0.0, payload=facts))
    shown(step("worker-0", 0, 1, tokens=64, hop_bytes=2_000_000))
    shown(Event(kind="shard", at=1.0, payload={"stage": "forward", "units": [0, 1], "left": 1, "produced": 2}))
    shown(
        Event(kind="lost", at=1.0, payload={"worker": "worker-1", "cause": "its node is gone", "shard": "forward 0002"})
    )
    line, lost = text.getvalue().splitlines()
    assert line.startswith("forward 2/4  ")
    assert "token-blocks/s" in line
    assert "2.0 MB moved" in line
    assert "ETA" in line
    assert "[worker-0 0000-0001 at 1]" in line
    assert lost == "lost worker-1: its node is gone; forward 0002 is run again"


def test_status_tells_a_stopped_run_from_a_finished_one(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", layers=3)
    config = configuration(tmp_path, source, "cluster.blocks_per_shard=1")
    with pytest.raises(KeyboardInterrupt):
        Run(config, open_workers=in_process(2, after(11))).measure()
    stopped = status.run(str(config.store.run))
    assert stopped["state"] == "stopped; the same command continues"
    assert 0 < stopped["blocks"]["encoded"] < 3
    assert stopped["blocks"]["total"] == 3
    run = Run(config, open_workers=in_process(2))
    run.measure()
    assemble.build(run, planning.allocate(run))
    finished = status.run(str(config.store.run))
    assert finished["state"] == "measured"
    assert finished["blocks"] == {"encoded": 3, "priced": 3, "total": 3}
    assert [stage["stage"] for stage in finished["stages"]][-1] == "backward"
    assert finished["repositories"][0]["uri"] == str(config.store.output)
    assert json.loads(json.dumps(finished)) == finished
    shown = io.StringIO()
    status.render(finished, Console(file=shown, width=160))
    assert "3 of 3 encoded, 3 of 3 priced" in shown.getvalue()


def test_status_of_what_is_no_run_store_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="is not a run store"):
            status.run(str(place))
