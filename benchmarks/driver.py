"""What the driver takes for large models, workers apart: `.venv/bin/python -m benchmarks.driver [--again]`.

Models without weights, each with half as many layers beside it: 2,000 dense ones, and 60 of 128 experts. Their run
stores have a record of every block, with figures that are made up, and the log of 64 workers and 64 microbatches on a
virtual clock, one block a shard. The controller's seconds are those that it and the log take for an event, of the
computer's clock. Of each command: CPU seconds and peak memory of its process. Figures: results/driver.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import demo, results
from benchmarks.simulation import Cost, Durations, whole_run
from benchmarks.usage import measured
from prismaquant_ray.event_log import EventLog
from prismaquant_ray.events import Event
from prismaquant_ray.storage.store import Store
from tests.large import dense, measured_run, mixture
from tests.virtual import conducted_run

RUNS = Path("runs/driver")
WORKERS, MICROBATCHES, EXPERTS = 64, 64, 128
LAYERS = {"dense": (1000, 2000), "experts": (30, 60)}
MODELS: dict[str, Callable[[Path, int], Path]] = {
    "dense": dense,
    "experts": lambda directory, layers: mixture(directory, layers, EXPERTS),
}
COMMANDS = ("inspect", "allocate", "sweep", "status", "report")
#: Those of a block of the demo on a core.
DURATIONS = Durations(
    entry=Cost(load=0.1, microbatch=0.01, finish=0.01),
    forward=Cost(load=0.05, microbatch=0.25, finish=2.5),
    exit=Cost(load=0.2, microbatch=0.5, finish=0.01),
    backward=Cost(load=0.1, microbatch=0.7, finish=0.05),
    hop=0.01,
    call=0.002,
)


def prepare(kind: str, layers: int) -> Path:
    """The directory of a model and its run store."""
    directory = RUNS / f"{kind}-{layers}"
    if not (directory / "done").exists():
        shutil.rmtree(directory, ignore_errors=True)
        measured_run(directory, MODELS[kind](directory / "source", layers))
        (directory / "done").touch()
    return directory


def conduct(directory: Path, layers: int) -> None:
    """Both passes, with their log in the run store; what they took goes into a file."""
    store = Store(directory / "run")
    store.delete(["events.jsonl"])
    log, kinds, logging = EventLog(store), list[str](), 0.0

    def listen(event: Event) -> None:
        nonlocal logging
        begun = time.process_time()
        kinds.append(event.event)
        log(event)
        logging += time.process_time() - begun

    work = whole_run(layers, MICROBATCHES, 1)
    begun = time.process_time()
    conducted_run(work, DURATIONS, WORKERS, listen)
    log.flush()
    seconds = time.process_time() - begun
    figures = {
        "events": len(kinds),
        "steps": kinds.count("step"),
        "microseconds_per_event": 1e6 * seconds / len(kinds),
        "of_them_for_the_log": 1e6 * logging / len(kinds),
        "log_bytes": store.size("events.jsonl"),
    }
    (directory / "conducted.json").write_text(json.dumps(figures))


def figures_of(kind: str, layers: int, repeats: int) -> dict[str, Any]:
    """Everything of one model; of commands the medians."""
    directory = prepare(kind, layers)
    usage = measured(
        [sys.executable, "-m", "benchmarks.driver", "--conduct", str(directory), str(layers)], log=directory / "log"
    )
    found: dict[str, Any] = {
        "layers": layers,
        "controller": json.loads((directory / "conducted.json").read_text()) | {"peak": usage.peak},
    }
    for name in COMMANDS:
        target = directory / "run" if name == "status" else directory / "config.yaml"
        runs = [measured(demo.command(name, target, [], "--json"), log=directory / "log") for _ in range(repeats)]
        found[name] = {"cpu": median(run.cpu for run in runs)}
        if name != "status":  # too short for a look at its memory
            found[name]["peak"] = median(run.peak for run in runs)
    report = Store(directory / "run/report")
    found["report"] |= {name: report.size(name) for name in ("report.html", "report.json")}
    print(f"{kind}, {layers} layers: " + json.dumps(found), flush=True)
    return found


def main() -> None:
    """Prepare, run, compare and file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conduct", nargs=2, metavar=("DIRECTORY", "LAYERS"), help="used by the command itself")
    parser.add_argument("--again", action="store_true", help="make the run stores anew")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.conduct:
        conduct(Path(arguments.conduct[0]), int(arguments.conduct[1]))
        return
    if arguments.again:
        shutil.rmtree(RUNS, ignore_errors=True)
    found = {kind: [figures_of(kind, layers, arguments.repeats) for layers in sizes] for kind, sizes in LAYERS.items()}
    results.save("driver", {"workers": WORKERS, "microbatches": MICROBATCHES, "experts": EXPERTS, "models": found})


if __name__ == "__main__":
    main()
