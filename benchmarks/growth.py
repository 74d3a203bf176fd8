"""How time grows with tokens, blocks and workers: `python -m benchmarks.growth [--draw]`.

Whole runs of `quantize` on the demo's model, from a fresh run store, around one in the middle (8 sequences of 512
tokens, 30 blocks, one worker of one thread): more and fewer tokens, the model cut off after fewer blocks, two workers.
A slope of 1 on logarithmic axes is proportional growth; what does not grow (the start; rounding, with tokens) flattens
the beginning. Figures go to results/growth.json, the plot to docs/images/growth.png; --draw only draws again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import demo, results
from benchmarks.usage import measured
from prismaquant_ray.event_log import steps_by_shard

PLOT = Path("docs/images/growth.png")
BLOCKS = 30


@dataclass(frozen=True, slots=True)
class Case:
    """One run: calibration sequences of 512 tokens, decoder blocks, workers of one thread each."""

    sequences: int = 8
    blocks: int = BLOCKS
    workers: int = 1


MIDDLE = Case()
SERIES = {
    "sequences": [replace(MIDDLE, sequences=n) for n in (2, 4, 8, 16)],
    "blocks": [replace(MIDDLE, blocks=n) for n in (4, 8, 15, 30)],
    "workers": [replace(MIDDLE, workers=n) for n in (1, 2)],
}
LABELS = {"sequences": "sequences of 512 tokens", "blocks": "decoder blocks", "workers": "workers"}
SHOWN = {"wall": "whole command", "forward": "forward pass, with rounding", "backward": "backward pass"}


def shortened(blocks: int, directory: Path) -> Path:
    """The demo's model cut off after some blocks."""
    if blocks == BLOCKS:
        return demo.MODEL.resolve()
    shutil.copytree(demo.MODEL, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    with safe_open(demo.MODEL / "model.safetensors", framework="pt") as file:
        kept = [name for name in file.keys() if not _beyond(name, blocks)]  # noqa: SIM118 - not a mapping
        save_file({name: file.get_tensor(name) for name in kept}, directory / "model.safetensors", {"format": "pt"})
    return directory


def _beyond(name: str, blocks: int) -> bool:
    parts = name.split(".")
    return "layers" in parts and int(parts[parts.index("layers") + 1]) >= blocks


def run(case: Case, overrides: Sequence[str]) -> dict[str, Any]:
    """Wall and CPU seconds of one run, and those of its passes."""
    with tempfile.TemporaryDirectory(prefix="growth-") as scratch:
        directory = Path(scratch)
        source = shortened(case.blocks, directory / "source")
        settings = [
            "evaluation=null", "budget.bpp=6", "sweep=[6.0]", f"model.source={source}",
            f"calibration.sequences={case.sequences}", f"cluster.workers={case.workers}",
            f"store.run={directory / 'run'}", f"store.output={directory / 'repository'}", *overrides,
        ]  # fmt: skip
        usage = measured(demo.command("quantize", settings=settings), log=directory / "log.txt")
        passes = {}
        for stage in ("forward", "backward"):
            work = [each for each in steps_by_shard(results.log_of(directory / "run")) if each.stage == stage]
            passes[stage] = max(each.ended for each in work) - min(each.started for each in work)
        return {**asdict(case), **asdict(usage), **passes}


def slopes(runs: Sequence[dict[str, Any]], key: str, figure: str) -> list[float]:
    """Exponent of growth between neighbouring runs."""
    return [log(b[figure] / a[figure]) / log(b[key] / a[key]) for a, b in pairwise(runs)]


def draw(series: dict[str, list[dict[str, Any]]]) -> None:
    """One panel for each of the three."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, (key, runs) in zip(figure.subplots(1, 3, sharey=True), series.items(), strict=True):
        for place, (name, label) in enumerate(SHOWN.items()):
            axes.plot([r[key] for r in runs], [r[name] for r in runs], marker="os^"[place], markersize=5, label=label)
        low, high = runs[0], runs[-1]
        ends = [low[key], high[key]]
        rises = -1 if key == "workers" else 1
        axes.plot(ends, [high["wall"] * (end / high[key]) ** rises for end in ends], color="0.7", linestyle=":",
                  label="proportional")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=LABELS[key], xticks=[r[key] for r in runs])
        axes.set_xticklabels([str(r[key]) for r in runs])
        axes.minorticks_off()
    figure.axes[0].set(ylabel="seconds")
    figure.axes[0].legend(frameon=False, fontsize=8)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=120, metadata={"Software": None})


def main() -> None:
    """Run, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    path = results.RESULTS / "growth.json"
    if not arguments.draw:
        demo.need()
        done: dict[Case, dict[str, Any]] = {}
        for case in dict.fromkeys(case for cases in SERIES.values() for case in cases):
            begun = time.perf_counter()
            done[case] = run(case, arguments.overrides)
            print(f"{case}: {time.perf_counter() - begun:.0f} s", flush=True)
        series = {key: [done[case] for case in cases] for key, cases in SERIES.items()}
        growth = {
            key: {name: slopes(runs, key, name) for name in (*SHOWN, "cpu", "peak")} for key, runs in series.items()
        }
        results.save("growth", {"series": series, "slopes": growth})
    found = json.loads(path.read_text())
    for key, by_figure in found["slopes"].items():
        print(f"{key}: " + "; ".join(f"{name} {[round(v, 2) for v in values]}" for name, values in by_figure.items()))
    draw(found["series"])


if __name__ == "__main__":
    main()
