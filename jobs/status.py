"""`status URI`: what a run store holds and what its driver last said; works without the cluster."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.events import Event, busy_shares, read_events
from actors.schedule.run_store import RunStore
from actors.schedule.units import Stage
from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.storage.lease import holder
from prismaquant_ray.storage.store import Store

# A driver says something at least this often while workers work.
_SILENCE = 120.0


def run(uri: str) -> dict[str, Any]:
    """Read records, lease and event log of a run store; InputError when there is none at `uri`."""
    try:
        store = Store(uri, create=False)
        store.check_readable()
        run_json = json.loads(store.get("run.json"))
    except (KeyError, StoreError) as error:
        if isinstance(error, StoreError) and store_exists(uri):
            raise
        raise InputError(f"{uri} is not a run store; give the store.run of a run") from error
    run_store, events = RunStore(store), read_events(store)
    shards = [event for event in events if event.kind == "pass"]
    config = run_json["config"]
    current = holder(store)
    return {
        "run": uri,
        "model": config["model"]["source"],
        "state": _state(store, events, current is not None and not current.is_gone),
        "blocks": {
            "encoded": len(run_store.recorded(Stage.FORWARD).done),
            "priced": len(run_store.recorded(Stage.BACKWARD).done),
            "total": _total(store, events),
        },
        "driver": None if current is None else {"host": current.host, "pid": current.pid},
        "last_event": None if not events else {"seconds_ago": time.time() - events[-1].at, **_body(events[-1])},
        "passes": len(shards),
        "workers": _workers(events),
        "lost": [_body(event) for event in events if event.kind == "lost"],
        "repairs": [_body(event) for event in events if event.kind == "repair"],
        "stages": [_stage(events, index) for index in _begins(events)],
        "repositories": [_body(event) for event in events if event.kind == "repository"],
    }


def store_exists(uri: str) -> bool:
    """Whether the place itself is there, so that what is wrong is something else."""
    from prismaquant_ray.storage.connection import local_path

    path = local_path(uri)
    return path is None or path.is_dir()


def _state(store: Store, events: list[Event], alive: bool) -> str:
    if store.size("measured.json") is not None:
        return "measured"
    if not alive:
        return "stopped; the same command continues"
    if events and time.time() - events[-1].at > _SILENCE:
        return f"running, silent for {time.time() - events[-1].at:.0f} s"
    return "running"


def _total(store: Store, events: list[Event]) -> int | None:
    if store.size("layout.json") is not None:
        return len(json.loads(store.get("layout.json"))["blocks"])
    begun = [event.payload["model_blocks"] for event in events if event.kind == "shards"]
    return begun[-1] if begun else None


def _begins(events: list[Event]) -> list[int]:
    return [index for index, event in enumerate(events) if event.kind == "pass"]


def _stage(events: list[Event], begin: int) -> dict[str, Any]:
    """One attempt at a pass: what it did, at what rate, and how busy its workers were."""
    first = events[begin]
    end = next((i for i, e in enumerate(events) if i > begin and e.kind in ("pass", "end", "begin")), len(events))
    steps = [event for event in events[begin:end] if event.kind == "step"]
    finished = [event for event in events[begin:end] if event.kind == "shard"]
    seconds = (events[end].at if end < len(events) else steps[-1].at if steps else first.at) - first.at
    tokens = sum(event.payload.get("tokens", 0) * event.payload["units"] for event in steps)
    done = sum(len(event.payload["units"]) for event in finished)
    left = first.payload["units"] - done
    return {
        "stage": first.payload["stage"],
        "units": first.payload["units"],
        "done": done,
        "seconds": seconds,
        "eta": seconds / done * left if done and left else None,
        "token_blocks_per_second": tokens / seconds if seconds else 0.0,
        "bytes": {
            kind: sum(event.payload.get(f"{kind}_bytes", 0) for event in steps) for kind in ("hop", "read", "written")
        },
        "busy": busy_shares(steps),
        "workers": {e.payload["worker"]: f"{e.payload['shard']} at {_at(e)}" for e in steps},
    }


def _at(event: Event) -> str:
    microbatch = event.payload["microbatch"]
    return "end" if microbatch is None else str(microbatch + 1)


def _workers(events: list[Event]) -> list[dict[str, Any]]:
    begin = max((i for i, event in enumerate(events) if event.kind == "begin"), default=0)
    lost = {event.payload["worker"] for event in events[begin:] if event.kind == "lost"}
    return [
        {**_body(event), "lost": event.payload["worker"] in lost} for event in events[begin:] if event.kind == "worker"
    ]


def _body(event: Event) -> dict[str, Any]:
    return {"event": event.kind, "at": event.at, **event.payload}


def render(result: dict[str, Any], console: Console) -> None:
    """The state of a run, for people."""
    blocks = result["blocks"]
    total = "" if blocks["total"] is None else f" of {blocks['total']}"
    console.print(f"{result['run']}: {result['model']}, {result['state']}")
    console.print(f"  blocks: {blocks['encoded']}{total} encoded, {blocks['priced']}{total} priced")
    if result["driver"]:
        console.print(f"  driver: process {result['driver']['pid']} on {result['driver']['host']}")
    if result["last_event"]:
        console.print(f"  last event: {result['last_event']['event']}, {result['last_event']['seconds_ago']:.0f} s ago")
    for worker in result["workers"]:
        state = "lost" if worker["lost"] else "ready"
        console.print(f"  {worker['worker']}: {worker['device']} on {worker['host']}, process {worker['pid']}, {state}")
    if result["stages"]:
        table = Table(box=None, pad_edge=False)
        for title in ("  pass", "units", "seconds", "ETA", "token-blocks/s", "MB hop", "read", "written", "busy"):
            table.add_column(title, justify="right")
        for stage in result["stages"]:
            busy = ", ".join(f"{share:.0%}" for share in stage["busy"].values())
            table.add_row(
                f"  {stage['stage']}",
                f"{stage['done']}/{stage['units']}",
                f"{stage['seconds']:.0f}",
                "" if stage["eta"] is None else f"{stage['eta']:.0f} s",
                f"{stage['token_blocks_per_second']:,.0f}",
                *(f"{stage['bytes'][kind] / 1e6:,.1f}" for kind in ("hop", "read", "written")),
                busy,
            )
        console.print(table)
        for worker, what in sorted(result["stages"][-1]["workers"].items()):
            console.print(f"  {worker}: {what}")
    for lost in result["lost"]:
        console.print(f"  lost: {lost['worker']}, {lost['cause']}; held {lost['shard']}")
    for repair in result["repairs"]:
        console.print(f"  repaired: {repair['key']}")
    for repository in result["repositories"]:
        console.print(
            f"  repository: {repository['uri']}, {repository['bytes'] / 1e6:,.1f} MB, {repository['bpp']:.4f} bits"
        )
