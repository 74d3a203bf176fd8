"""`report`: what a run found, as one HTML page, its JSON and PNGs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import platform, python_version
from typing import Any

import numpy as np
from rich.console import Console

from actors.events import Event, busy_shares, read_events
from actors.schedule.units import Stage
from jobs import planning
from jobs.run import Run
from prismaquant_ray import __version__
from prismaquant_ray.allocation.frontier import frontier
from prismaquant_ray.config import BudgetConfig, Config, ModelConfig
from prismaquant_ray.report import facts, measured
from prismaquant_ray.storage.connection import local_path
from prismaquant_ray.storage.record import read_record
from prismaquant_ray.storage.store import Store, check_directory

SCHEMA = 1
#: Where the report is in the run store.
PLACE = "report"
_PACKAGES = ("torch", "transformers", "compressed-tensors", "ray", "safetensors", "numpy")


def run(config: Config, *, out: str | None = None) -> dict[str, Any]:
    """Measure what is missing, then write the report below `report/` of the run store, or into `out`."""
    current = Run(config)
    if out is not None:
        path = local_path(out)
        Store(out, create=False).check_writable() if path is None else check_directory(path)
    report = current.repairing(lambda: gather(current))
    store, prefix = (current.store, f"{PLACE}/") if out is None else (Store(out), "")
    written = write(report, store, prefix)
    return {
        "report": f"{store.uri.rstrip('/')}/{prefix}report.html",
        "files": [f"{store.uri.rstrip('/')}/{key}" for key in written],
        "measured": report["measured"] is not None,
    }


def write(report: Mapping[str, Any], store: Store, prefix: str) -> list[str]:
    """Draw everything, then put it into the store; the page last, so that it never shows what is not there."""
    # Not at the top: other commands do without matplotlib and jinja2.
    from prismaquant_ray.report.page import page
    from prismaquant_ray.report.plots import plots

    body = json.dumps(report, indent=1, allow_nan=False).encode()
    objects = {f"{name}.png": data for name, data in plots(report).items()}
    objects |= {"report.json": body, "report.html": page(report).encode()}
    for name, data in objects.items():
        store.put(f"{prefix}{name}", data)
    return [f"{prefix}{name}" for name in reversed(objects)]


def gather(current: Run) -> dict[str, Any]:
    """Everything the report says: docs/report.md describes the keys."""
    config = current.config
    current.measure()
    started = time.perf_counter()
    sweep = planning.sweep_targets(current)
    planned = planning.allocate(current)
    planning_seconds = time.perf_counter() - started
    events = read_events(current.store)
    records = {stage: {i: record.metrics for i, record in found.items()} for stage, found in current.records.items()}
    forward, backward = records[Stage.FORWARD], records[Stage.BACKWARD]
    formats, blocks = facts.formats_of(config.formats), facts.blocks_of(current.layout)
    weight = config.allocation.mtp_weight
    groups = facts.groups_of(
        current.layout,
        current.table,
        current.sizes,
        backward,
        objective=config.allocation.objective,
        draft_weight=weight,
    )
    found = {plan["target"]: plan for plan in (*sweep["targets"], planned)}
    plans = [_plan(plan, config, groups) for plan in sorted(found.values(), key=lambda plan: plan["weight_bytes"])]
    uniform = facts.uniform_of(groups, formats, current.sizes)
    choices = {target: plan["choice"] for target, plan in found.items()}
    known = measured.join(plans, uniform, current.stored("plans/measured.json", made_by="sweep --measure"), choices)
    place = next(index for index, plan in enumerate(plans) if plan["target"] == config.budget.target)
    return {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": current.store.uri,
        "model": _model(current),
        "formats": formats,
        "objective": config.allocation.objective,
        "budget": place,
        "plans": plans,
        "out_of_reach": sweep["out_of_reach"],
        "uniform": uniform,
        "frontier": _frontier(current),
        "knee": sweep["knee"],
        "measured": known,
        "blocks": blocks,
        "groups": groups,
        "composition": facts.composition(groups, blocks, formats, plans[place]["choice"]),
        "repository": _repository(current, plans[place], events),
        "rounding": facts.rounding_of(current.layout, config.formats, forward),
        "experts": facts.experts_of(current.layout, forward),
        "draft": facts.draft_of(current.layout, groups, formats, backward, weight),
        "calibration": _calibration(current, backward),
        "timings": {**timings(events), "planning_seconds": planning_seconds},
        "machines": _machines(current, events),
        "versions": _versions(),
        "settings": config.model_dump(mode="json"),
    }


def _plan(plan: Mapping[str, Any], config: Config, groups: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("target", "bpp", "predicted_loss", "gap", "weight_bytes", "repository_bytes_at_most", "groups")
    return {
        **{key: plan[key] for key in kept},
        **{key: plan.get(key) for key in ("loaded_bytes", "vram")},
        "standard_error": plan["standard_error"] if config.allocation.objective == "token_fisher" else None,
        "choice": facts.encoded(plan["choice"], dict(groups)),
    }


def _model(current: Run) -> dict[str, Any]:
    layout, source = current.layout, current.source
    reasons: dict[str, list[str]] = {}
    for name, reason in layout.ignored.items():
        reasons.setdefault(reason, []).append(name)
    return {
        "title": _title(current.config.model),
        "source": current.config.model.source,
        "embedded": current.config.model.embedded,
        "revision": current.config.model.revision,
        "architecture": layout.architecture,
        "family": layout.family,
        "guesses": list(layout.guesses),
        "parameters": sum(math.prod(info.shape) for info in source.tensors.values()),
        "quantizable_parameters": layout.parameters,
        "linears": sum(len(linear.names) for linear in layout.linears()),
        "source_bytes": sum(info.nbytes for info in source.stored.values()),
        "kept": reasons,
    }


def _title(model: ModelConfig) -> str:
    """A hub id as it is, of anything that is a place its last part."""
    if model.embedded is not None:
        return model.embedded
    if "://" in model.source or Path(model.source).is_dir():
        return model.source.rstrip("/").rpartition("/")[2]
    return model.source


def _frontier(current: Run) -> dict[str, list[float]] | None:
    """Every breakpoint of the whole frontier; None where a second limit leaves it without any."""
    if current.sizes.second is not None:
        return None
    curve = frontier(planning.problem(current, BudgetConfig(bpp=1.0)))
    return {
        "bpp": [current.sizes.bpp(int(size)) for size in curve.bytes],
        "predicted_loss": np.maximum(curve.cost, 0.0).tolist(),
    }


def _repository(current: Run, plan: Mapping[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    """What the repository of the budget's plan holds; `written` is the last one that was, or None."""
    source, layout = current.source, current.layout
    quantizable = {name for linear in layout.linears() for name in linear.sources}
    kept = {name: info.nbytes for name, info in source.tensors.items() if name not in quantizable}
    embedding = sum(size for name, size in kept.items() if name in layout.embedding)
    written = (event.payload for event in reversed(events) if event.kind == "repository")
    return {
        "written": next((found for found in written if found["target"] == plan["target"]), None),
        "quantizable_bytes": plan["weight_bytes"],
        "embedding_bytes": embedding,
        "other_tensor_bytes": sum(kept.values()) - embedding,
        "at_most_bytes": plan["repository_bytes_at_most"],
    }


def _calibration(current: Run, backward: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    run_json = json.loads(current.store.get("run.json"))
    calibration = current.config.calibration
    record = read_record(current.store, "calibration/record.json")
    return {
        "text": calibration.text.name,
        "sequences": calibration.sequences,
        "length": calibration.length,
        "tokens": calibration.sequences * calibration.length,
        "priced_tokens": max(found["tokens"] for found in backward.values()),
        "images": None if calibration.images is None else calibration.images.name,
        "digest": None if record is None else record.metrics["fingerprint"],
        "fingerprint": run_json["fingerprint"],
    }


def _machines(current: Run, events: Sequence[Event]) -> dict[str, Any]:
    """Where workers ran, over all attempts."""
    hosts: dict[tuple[str, ...], dict[str, Any]] = {}
    for found in (event.payload for event in events if event.kind == "worker"):
        key = (found["host"], found["device"], found["version"])
        entry = hosts.setdefault(key, {**dict(zip(("host", "device", "version"), key, strict=True)), "names": set()})
        entry["names"].add(found["worker"])
        entry["host_bytes"] = found["host_bytes"]
    return {
        "hosts": [
            {**{k: v for k, v in entry.items() if k != "names"}, "workers": len(entry["names"])}
            for entry in hosts.values()
        ],
        "lost": sum(event.kind == "lost" for event in events),
        "repairs": sum(event.kind == "repair" for event in events),
        "peak_worker_bytes": json.loads(current.store.get("measured.json"))["peak_bytes"],
    }


def _versions() -> dict[str, str | None]:
    """Of the machine that writes the report; None for what is not installed there."""
    found: dict[str, str | None] = {"prismaquant_ray": __version__, "python": python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {**found, "platform": platform()}


def timings(events: Sequence[Event]) -> dict[str, Any]:
    """Every pass and what each worker did in it; seconds are of the wall clock, `spans` count from the pass's begin."""
    bounds = [index for index, event in enumerate(events) if event.kind == "pass"]
    passes = []
    for begin in bounds:
        stop = next((i for i, e in enumerate(events) if i > begin and e.kind in ("pass", "end", "begin")), len(events))
        steps = [event for event in events[begin:stop] if event.kind == "step"]
        if not steps:
            continue
        start = events[begin].at
        last = max(event.at for event in steps)
        end = events[stop].at if stop < len(events) and events[stop].kind != "begin" else last
        begun = events[begin].payload
        tokens = sum(event.payload.get("tokens", 0) * event.payload["units"] for event in steps)
        passes.append(
            {
                "stage": begun["stage"],
                "units": begun["units"],
                "seconds": end - start,
                "token_blocks_per_second": tokens / (end - start) if end > start else None,
                **{
                    f"{k}_bytes": sum(e.payload.get(f"{k}_bytes", 0) for e in steps) for k in ("hop", "read", "written")
                },
                "workers": _workers(steps, start),
            }
        )
    return {"attempts": sum(event.kind == "begin" for event in events), "passes": passes}


def _workers(steps: Sequence[Event], start: float) -> list[dict[str, Any]]:
    busy = busy_shares(steps)
    found = []
    for worker in sorted({event.payload["worker"] for event in steps}):
        own = [event for event in steps if event.payload["worker"] == worker]
        spans: dict[str, list[float]] = {}
        for event in own:
            begin = event.payload["started"] - start
            end = begin + event.payload["seconds"]
            span = spans.setdefault(event.payload["shard"], [begin, end])
            span[:] = min(span[0], begin), max(span[1], end)
        found.append(
            {
                "worker": worker,
                "steps": len(own),
                "seconds": sum(event.payload["seconds"] for event in own),
                "busy": busy.get(worker),
                "peak_bytes": max(event.payload["peak_bytes"] for event in own),
                "spans": [[shard, round(begin, 2), round(end, 2)] for shard, (begin, end) in spans.items()],
            }
        )
    return found


def render(result: dict[str, Any], console: Console) -> None:
    """Where it is."""
    for path in result["files"]:
        console.print(path, soft_wrap=True)
    if not result["measured"]:
        console.print("losses are predicted, not measured: run sweep --measure, then report again")
