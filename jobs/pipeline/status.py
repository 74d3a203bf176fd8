"""The state of a run, from its store alone, without cluster or model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from actors.schedule.run_store import RunStore
from actors.schedule.units import Stage
from prismaquant_ray import records
from prismaquant_ray.attempts import PassAttempt, busy_shares, pass_attempts
from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.events import (
    Event,
    ObjectRepaired,
    RepositoryWritten,
    RunBegan,
    ShardsSized,
    WorkerLost,
    WorkerReady,
    read_events,
)
from prismaquant_ray.parsing import MAX_BYTES
from prismaquant_ray.records import RunRecord
from prismaquant_ray.serialization import from_bytes, to_json
from prismaquant_ray.storage.connection import local_path
from prismaquant_ray.storage.lease import holder
from prismaquant_ray.storage.store import Store

# Seconds; a running driver logs events more often than this.
_SILENCE = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCounts:
    """Blocks with candidates, blocks with prices, blocks of the model (None before any worker was ready)."""

    encoded: int
    priced: int
    total: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """The process that holds the run's lease."""

    host: str
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PassStatus:
    """One attempt at a pass: units, units done, seconds, seconds left, rate, bytes moved by kind, busy share by worker.

    `workers` has the last shard and microbatch of each worker.
    """

    stage: str
    units: int
    done: int
    seconds: float
    eta: float | None
    token_blocks_per_second: float
    bytes: dict[str, int]
    busy: dict[str, float]
    workers: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus(WorkerReady):
    """A worker that was ready, and whether it is lost."""

    lost: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """The state of a run; `silent` are the seconds since the last event."""

    run: str
    model: str
    state: str
    blocks: BlockCounts
    driver: Driver | None
    last_event: Event | None
    silent: float | None
    passes: int
    workers: list[WorkerStatus]
    lost: list[WorkerLost]
    repairs: list[ObjectRepaired]
    stages: list[PassStatus]
    repositories: list[RepositoryWritten]


def status(uri: str) -> Status:
    """Read records, lease and event log of a run store.

    Raises:
        InputError: there is no run store at `uri`.
    """
    store, run = _open(uri)
    run_store, events = RunStore(store), read_events(store)
    attempts = pass_attempts(events)
    # Steps that are not summed yet stand behind what was said since.
    last = max(events, key=lambda event: event.at, default=None)
    silent = None if last is None else time.time() - last.at
    current = holder(store)
    return Status(
        run=uri,
        model=run.source,
        state=_state(run_store, silent, alive=current is not None and not current.is_gone),
        blocks=BlockCounts(
            encoded=len(run_store.recorded(Stage.FORWARD).done),
            priced=len(run_store.recorded(Stage.BACKWARD).done),
            total=next((event.model_blocks for event in reversed(events) if isinstance(event, ShardsSized)), None),
        ),
        driver=None if current is None else Driver(host=current.host, pid=current.pid),
        last_event=last,
        silent=silent,
        passes=len(attempts),
        workers=_workers(events),
        lost=[event for event in events if isinstance(event, WorkerLost)],
        repairs=[event for event in events if isinstance(event, ObjectRepaired)],
        stages=[_pass(attempt) for attempt in attempts],
        repositories=[event for event in events if isinstance(event, RepositoryWritten)],
    )


def _open(uri: str) -> tuple[Store, RunRecord]:
    try:
        store = Store(uri, create=False)
        store.check_readable()
        record = from_bytes(RunRecord, store.get(records.RUN, MAX_BYTES))
        _ = record.source
    except ValueError as error:
        raise InputError(f"{uri}: {records.RUN} cannot be read ({error}); give the store.run of a run") from error
    except (KeyError, StoreError) as error:
        path = local_path(uri)
        if isinstance(error, StoreError) and (path is None or path.is_dir()):
            raise  # the place exists: something else is wrong
        raise InputError(f"{uri} is not a run store; give the store.run of a run") from error
    return store, record


def _state(run_store: RunStore, silent: float | None, *, alive: bool) -> str:
    if run_store.measured is not None:
        return "measured"
    if not alive:
        return "stopped; the same command continues"
    if silent is not None and silent > _SILENCE:
        return f"running, silent for {silent:.0f} s"
    return "running"


def _pass(attempt: PassAttempt) -> PassStatus:
    done = sum(len(shard.units) for shard in attempt.shards)
    left = attempt.began.units - done
    return PassStatus(
        stage=attempt.began.stage,
        units=attempt.began.units,
        done=done,
        seconds=attempt.seconds,
        eta=attempt.seconds / done * left if done and left else None,
        token_blocks_per_second=attempt.token_blocks / attempt.seconds if attempt.seconds else 0.0,
        bytes=attempt.moved(),
        busy=busy_shares(attempt.work),
        workers={
            work.worker: f"{work.shard} at {'end' if work.microbatch is None else work.microbatch + 1}"
            for work in attempt.work
        },
    )


def _workers(events: Sequence[Event]) -> list[WorkerStatus]:
    """Workers of the last driver, and which of them are lost."""
    begin = max((i for i, event in enumerate(events) if isinstance(event, RunBegan)), default=0)
    lost = {event.worker for event in events[begin:] if isinstance(event, WorkerLost)}
    ready = [event for event in events[begin:] if isinstance(event, WorkerReady)]
    return [WorkerStatus(**to_json(event), lost=event.worker in lost) for event in ready]
