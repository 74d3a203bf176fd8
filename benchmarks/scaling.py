"""The demo with 1, 2 and 4 workers: equal bytes, wall time, busy shares, bytes moved, and how well a model predicts it.

    .venv/bin/python -m benchmarks.scaling configs/demo.yaml [--workers 1,2,4] [--set key=value …] [--again]

Runs `quantize` once for each number of workers, one after another, in `runs/scaling/`; a run that is there already is
not repeated unless `--again` is given. Durations are the medians of its event log; `benchmarks.simulation` turns them
into a makespan. Needs the configuration's model. Results go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import demo, results
from benchmarks.simulation import PASSES, Cost, Durations, Stage, predicted, simulate, whole_run
from prismaquant_ray import Event, load_config
from prismaquant_ray.attempts import PassAttempt, busy_shares, pass_attempts
from prismaquant_ray.event_log import steps_by_shard
from prismaquant_ray.events import ShardsSized, ShardSteps

RUNS = Path("runs/scaling")


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
        command = demo.command("quantize", config, settings, "--json")
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


def durations_of(events: Sequence[Event]) -> Durations:
    """Medians over a run's log. On one machine an input is in shared memory already, so `hop` stays 0.

    `load` is what the first call of a shard takes longer than the others, which is what was not read ahead; for exits,
    a worker's first one.
    """
    work = steps_by_shard(events)
    return Durations(
        entry=_cost([each for each in work if each.shard == "entry"]),
        forward=_cost([each for each in _in_blocks(work) if each.stage == Stage.FORWARD]),
        exit=_cost([each for each in work if _is_exit(each)]),
        backward=_cost([each for each in _in_blocks(work) if each.stage == Stage.BACKWARD]),
        # From the end of a shard's last microbatch to its finish, which never waits for anything but the driver.
        call=median([each.gap for each in work if each.gap is not None]),
    )


def _cost(work: Sequence[ShardSteps]) -> Cost:
    first, others, finish = [], [], []
    begun: set[str] = set()
    for each in work:
        # An exit has one microbatch, and only a worker's first one loads the head.
        loads = not _is_exit(each) or each.worker not in begun
        begun.add(each.worker)
        (first if loads else others).append(each.first / each.units)
        others += [] if each.median is None else [each.median / each.units]
        finish += [] if each.finish is None else [each.finish / each.units]
    microbatch = median(others or first)
    return Cost(load=max(0.0, median(first) - microbatch), microbatch=microbatch, finish=median(finish))


def _is_exit(work: ShardSteps) -> bool:
    return work.shard.startswith("exit-")


def _in_blocks(work: Iterable[ShardSteps]) -> list[ShardSteps]:
    return [each for each in work if each.shard not in ("pixels", "entry") and not _is_exit(each)]


def makespan(work: Sequence[ShardSteps]) -> float:
    """From the first call of a pass to the end of its last one."""
    return max(each.ended for each in work) - min(each.started for each in work)


def repeated(work: Iterable[ShardSteps]) -> int:
    """Calls that did again what one before had done: a shard's calls come in one order."""
    found: dict[tuple[str, str], list[int]] = {}
    for each in work:
        found.setdefault((each.stage, each.shard), []).append(each.steps)
    return sum(sum(steps) - max(steps) for steps in found.values())


def log_of(workers: int) -> list[Event]:
    """The events of the run with so many workers."""
    return results.log_of(RUNS / str(workers) / "run")


def measured(workers: int, run: dict[str, Any]) -> dict[str, Any]:
    """Everything a run's log and its own summary say."""
    events = log_of(workers)
    printed = run["printed"]
    return {
        "seconds": {"wall": run["wall"], **printed["seconds"]},
        "load_before": run["load_before"],
        "blocks_per_shard": _shards(events).blocks,
        "passes": {attempt.began.stage: _pass(attempt) for attempt in pass_attempts(events)},
        "peak_worker_bytes": printed["probe"]["peak_worker_bytes"],
        "steps": sum(each.steps for each in steps_by_shard(events)),
        "repeated_steps": repeated(steps_by_shard(events)),
    }


def _pass(attempt: PassAttempt) -> dict[str, Any]:
    return {
        "seconds": makespan(attempt.work),
        "busy": busy_shares(attempt.work),
        "busy_in_blocks": busy_shares(_in_blocks(attempt.work)),
        "bytes": attempt.moved(),
    }


def _shards(events: Sequence[Event]) -> ShardsSized:
    return next(event for event in events if isinstance(event, ShardsSized))


def prediction(workers: int, fitted: int, microbatches: int) -> dict[str, Any]:
    """Makespan of the run with `workers`, from the durations of the one with `fitted`."""
    events, durations = log_of(workers), durations_of(log_of(fitted))
    shards = _shards(events)
    work = whole_run(shards.model_blocks, microbatches, shards.blocks)
    found: dict[str, Any] = {"workers": workers, "durations_of": fitted}
    for stage in PASSES:
        simulated = simulate(work.of(stage), durations, workers)
        seconds = makespan([each for each in steps_by_shard(events) if each.stage == stage])
        found[str(stage)] = {
            "measured": seconds,
            "simulated": simulated.seconds,
            "closed_form": predicted(work.of(stage), durations, workers),
            "busy_simulated": simulated.busy,
        }
    return found


def durations_as_dict(workers: int) -> dict[str, Any]:
    """What was fitted."""
    found = asdict(durations_of(log_of(workers)))
    del found["hop"]  # not measured
    return found


def tables(figures: dict[str, Any]) -> str:
    """The measured part of docs/scaling.md."""
    lines = [
        "| workers | blocks a shard | wall s | measure s | forward s | backward s | busy forward | busy backward "
        "| MB hopped | MB read | MB written | peak MB | repeated |",
        "|" + "---|" * 13,
    ]
    for workers, run in figures["runs"].items():
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
    for entry in figures["predictions"]:
        for stage in PASSES:
            found = entry[str(stage)]
            seconds = found["measured"]
            lines.append(
                f"| {entry['workers']} | {entry['durations_of']} | {stage} | {seconds:.1f} "
                f"| {found['simulated']:.1f} ({found['simulated'] / seconds - 1:+.1%}) "
                f"| {found['closed_form']:.1f} ({found['closed_form'] / seconds - 1:+.1%}) |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run, compare, predict, print and file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workers", default="1,2,4", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="where figures go")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
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
    figures = {
        "microbatches": microbatches,
        "runs": runs,
        "durations": {str(n): durations_as_dict(n) for n in arguments.workers},
        "predictions": [prediction(n, fitted, microbatches) for n, fitted in pairs],
        "identical_files": first,
    }
    print(tables(figures))
    print(f"\n{len(first)} files, the same bytes with {', '.join(map(str, hashes))} workers")
    if max(arguments.workers) > cores:
        print(f"this machine has {cores} cores: more workers than that share them and cannot be faster")
    results.save(f"{datetime.datetime.now(tz=datetime.UTC).date()}-scaling", figures, arguments.results)


if __name__ == "__main__":
    main()
