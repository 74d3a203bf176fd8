"""The demo with 1, 2 and 4 workers: equal bytes, wall time, busy shares, bytes moved, and how well a model predicts it.

    .venv/bin/python -m benchmarks.scaling configs/demo.yaml [--workers 1,2,4] [--set key=value …] [--again]

Runs `quantize` once for each number of workers, one after another, in `runs/scaling/`; a run that is there already is
not repeated unless `--again` is given. Durations are the medians of its event log; `benchmarks.simulation` turns them
into a makespan. Needs the demo's source, which the first run writes. Results go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from actors.events import Event, busy_shares, read_events
from actors.schedule.units import PASSES, Stage
from benchmarks.simulation import Cost, Durations, predicted, simulate, whole_run
from jobs import status
from prismaquant_ray.config import load
from prismaquant_ray.storage.store import Store

RUNS = Path("runs/scaling")
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "compressed-tensors", "ray")


def quantized(config: Path, workers: int, overrides: Sequence[str], *, again: bool) -> dict[str, Any]:
    """A whole run in a process of its own: what it printed, with its wall time."""
    directory = RUNS / str(workers)
    result = directory / "result.json"
    if again or not result.exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        settings = [
            *overrides,
            f"cluster.workers={workers}",
            f"store.run={directory}/run",
            f"store.output={directory}/repository",
        ]
        command = [sys.executable, "-m", "jobs", "quantize", str(config), "--json"]
        for setting in settings:
            command += ["--set", setting]
        load_before = os.getloadavg()[0]
        started = time.monotonic()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        wall = time.monotonic() - started
        result.write_text(json.dumps({"wall": wall, "load_before": load_before, "printed": json.loads(done.stdout)}))
    return json.loads(result.read_text())


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def steps_of(events: Iterable[Event], stage: Stage) -> list[Event]:
    """The calls of a pass."""
    return [event for event in events if event.kind == "step" and event.payload["stage"] == stage]


def durations_of(events: Sequence[Event]) -> Durations:
    """Medians over a run's log. On one machine an input is in shared memory already, so `hop` stays 0.

    `load` is what the first call of a shard takes longer than the others, which is what was not read ahead; for exits,
    a worker's first one.
    """
    steps = [event for event in events if event.kind == "step"]
    return Durations(
        entry=_cost([e for e in steps if e.payload["shard"] == "entry"]),
        forward=_cost([e for e in _blocks(steps) if e.payload["stage"] == Stage.FORWARD]),
        exit=_cost([e for e in steps if _is_exit(e)]),
        backward=_cost([e for e in _blocks(steps) if e.payload["stage"] == Stage.BACKWARD]),
        call=_between_calls(steps),
    )


def _cost(steps: Sequence[Event]) -> Cost:
    first, others, finish = [], [], []
    begun: set[tuple[str, str]] = set()
    for event in steps:
        each = event.payload["seconds"] / event.payload["units"]
        key = event.payload["worker"], "exit" if _is_exit(event) else event.payload["shard"]
        if event.payload["microbatch"] is None:
            finish.append(each)
        elif key not in begun:
            begun.add(key)
            first.append(each)
        else:
            others.append(each)
    microbatch = median(others or first)
    return Cost(load=max(0.0, median(first) - microbatch), microbatch=microbatch, finish=median(finish))


def _between_calls(steps: Sequence[Event]) -> float:
    """From the end of a shard's last microbatch to its FINISH, which never waits for anything but the driver."""
    ended: dict[str, float] = {}
    gaps = []
    for event in steps:
        worker, started = event.payload["worker"], event.payload["started"]
        if event.payload["microbatch"] is None and worker in ended:
            gaps.append(max(0.0, started - ended[worker]))
        ended[worker] = started + event.payload["seconds"]
    return median(gaps)


def _is_exit(event: Event) -> bool:
    return event.payload["shard"].startswith("exit-")


def _blocks(steps: Iterable[Event]) -> list[Event]:
    return [event for event in steps if event.payload["shard"] not in ("pixels", "entry") and not _is_exit(event)]


def makespan(steps: Sequence[Event]) -> float:
    """From the first call of a pass to the end of its last one."""
    ends = [event.payload["started"] + event.payload["seconds"] for event in steps]
    return max(ends) - min(event.payload["started"] for event in steps)


def repeated(steps: Iterable[Event]) -> int:
    """Calls that did again what one before had done."""
    keys = [(e.payload["stage"], e.payload["shard"], e.payload["microbatch"]) for e in steps]
    return len(keys) - len(set(keys))


def measured(workers: int, run: dict[str, Any]) -> dict[str, Any]:
    """Everything a run's log and its own summary say."""
    uri = str(RUNS / str(workers) / "run")
    events = read_events(Store(uri, create=False))
    printed = run["printed"]
    stages = status.run(uri)["stages"]
    return {
        "seconds": {"wall": run["wall"], **printed["seconds"]},
        "load_before": run["load_before"],
        "blocks_per_shard": _shards(events)["blocks"],
        "passes": {
            stage["stage"]: {
                "seconds": makespan(steps_of(events, Stage(stage["stage"]))),
                "busy": stage["busy"],
                "busy_in_blocks": busy_shares(_blocks(steps_of(events, Stage(stage["stage"])))),
                "bytes": stage["bytes"],
            }
            for stage in stages
        },
        "peak_worker_bytes": printed["probe"]["peak_worker_bytes"],
        "steps": sum(event.kind == "step" for event in events),
        "repeated_steps": repeated(event for event in events if event.kind == "step"),
    }


def _shards(events: Sequence[Event]) -> dict[str, Any]:
    return next(event.payload for event in events if event.kind == "shards")


def prediction(workers: int, fitted: int, microbatches: int) -> dict[str, Any]:
    """Makespan of the run with `workers`, from the durations of the one with `fitted`."""
    events, source = (read_events(Store(str(RUNS / str(n) / "run"), create=False)) for n in (workers, fitted))
    durations = durations_of(source)
    shards = _shards(events)
    work = whole_run(shards["model_blocks"], microbatches, shards["blocks"])
    found: dict[str, Any] = {"workers": workers, "durations_of": fitted}
    for stage in PASSES:
        simulated = simulate(work.of(stage), durations, workers)
        seconds = makespan(steps_of(events, stage))
        found[str(stage)] = {
            "measured": seconds,
            "simulated": simulated.seconds,
            "closed_form": predicted(work.of(stage), durations, workers),
            "busy_simulated": simulated.busy,
        }
    return found


def durations_as_dict(workers: int) -> dict[str, Any]:
    """What was fitted."""
    found = durations_of(read_events(Store(str(RUNS / str(workers) / "run"), create=False)))
    kinds = ("entry", "forward", "exit", "backward")
    costs = {kind: getattr(found, kind) for kind in kinds}
    body = {k: {"load": c.load, "microbatch": c.microbatch, "finish": c.finish} for k, c in costs.items()}
    return {**body, "call": found.call}


def tables(results: dict[str, Any]) -> str:
    """The measured part of docs/scaling.md."""
    lines = [
        "| workers | blocks a shard | wall s | measure s | forward s | backward s | busy forward | busy backward "
        "| MB hopped | MB read | MB written | peak MB | repeated |",
        "|" + "---|" * 13,
    ]
    for workers, run in results["runs"].items():
        passes = run["passes"]
        moved = {kind: sum(p["bytes"][kind] for p in passes.values()) / 1e6 for kind in ("hop", "read", "written")}
        busy = [", ".join(f"{share:.0%}" for share in p["busy"].values()) or "–" for p in passes.values()]
        lines.append(
            f"| {workers} | {run['blocks_per_shard']} | {run['seconds']['wall']:.0f} | {run['seconds']['measure']:.0f} "
            f"| {passes['forward']['seconds']:.1f} | {passes['backward']['seconds']:.1f} | {busy[0]} | {busy[1]} "
            f"| {moved['hop']:,.0f} | {moved['read']:,.0f} | {moved['written']:,.0f} "
            f"| {run['peak_worker_bytes'] / 1e6:,.0f} | {run['repeated_steps']} |"
        )
    lines += [
        "",
        "| workers | durations of | pass | measured s | simulated | closed form |",
        "|---|---|---|---|---|---|",
    ]
    for entry in results["predictions"]:
        for stage in PASSES:
            found = entry[str(stage)]
            seconds = found["measured"]
            lines.append(
                f"| {entry['workers']} | {entry['durations_of']} | {stage} | {seconds:.1f} "
                f"| {found['simulated']:.1f} ({found['simulated'] / seconds - 1:+.1%}) "
                f"| {found['closed_form']:.1f} ({found['closed_form'] / seconds - 1:+.1%}) |"
            )
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores and memory."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU"


def main() -> None:
    """Run, compare, predict, print and file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workers", default="1,2,4", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    config = load(arguments.config, arguments.overrides)
    microbatches = -(-config.calibration.sequences // config.calibration.microbatch)
    runs, hashes = {}, {}
    for workers in arguments.workers:
        run = quantized(arguments.config, workers, arguments.overrides, again=arguments.again)
        runs[str(workers)] = measured(workers, run)
        hashes[workers] = digests(RUNS / str(workers) / "repository")
    first = hashes[arguments.workers[0]]
    for workers, found in hashes.items():
        different = [name for name in first.keys() | found.keys() if first.get(name) != found.get(name)]
        assert not different, f"{workers} workers wrote other bytes: {different}"
    cores = os.cpu_count() or 1
    base = arguments.workers[0]
    pairs = [(n, n) for n in arguments.workers if n <= cores]
    pairs += [(n, base) for n in arguments.workers if n <= cores and n != base]
    results = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": " ".join([".venv/bin/python -m benchmarks.scaling", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "microbatches": microbatches,
        "runs": runs,
        "durations": {str(n): durations_as_dict(n) for n in arguments.workers},
        "predictions": [prediction(n, fitted, microbatches) for n, fitted in pairs],
        "identical_files": first,
    }
    print(tables(results))
    print(f"\n{len(first)} files, the same bytes with {', '.join(map(str, hashes))} workers")
    if max(arguments.workers) > cores:
        print(f"this machine has {cores} cores: more workers than that share them and cannot be faster")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{results['date']}-scaling.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
