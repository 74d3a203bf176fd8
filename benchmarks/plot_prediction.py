"""The plot of docs/concepts.md: predicted cost against measured KL, one fused group at a time.

.venv/bin/python -m benchmarks.quality configs/demo.yaml --parts prediction > benchmarks/results/demo-prediction.json
.venv/bin/python -m benchmarks.plot_prediction benchmarks/results/demo-prediction.json docs/images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKERS = {"NVFP4": ("o", "#0072b2"), "MXFP8": ("s", "#d55e00")}


def panel(axes: Axes, pairs: list[dict[str, Any]], objective: str, title: str, agreement: dict[str, float]) -> None:
    """One objective against what was measured, on logarithmic axes with the line of a perfect prediction."""
    values = [pair[key] for pair in pairs for key in (objective, "measured")]
    ends = 0.7 * min(values), 1.4 * max(values)
    axes.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
    for name, (marker, colour) in MARKERS.items():
        own = [pair for pair in pairs if pair["format"] == name]
        x, y = ([pair[key] for pair in own] for key in (objective, "measured"))
        axes.scatter(x, y, s=18, marker=marker, facecolors="none", edgecolors=colour, label=name, zorder=2)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal", title=title)
    axes.set(xlabel="predicted, nats per token", ylabel="measured KL, nats per token")
    shown = f"rank correlation {agreement['rank_correlation']:.3f}\nmedian ratio {agreement['median_ratio']:.2f}"
    axes.text(0.97, 0.04, shown, transform=axes.transAxes, ha="right", va="bottom", fontsize=9)
    axes.legend(loc="upper left", frameon=False)


def draw(found: dict[str, Any], target: Path) -> None:
    """Write the plot of both objectives, without a display."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    panel(left, found["each"], "predicted", "token_fisher: Fisher × real error", found)
    panel(right, found["each"], "fisher_trace", "fisher_trace: Fisher × mean ΔW²", found["fisher_trace"])
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, metadata={"Software": None})


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    found = json.loads(arguments.result.read_text())["prediction"]
    draw(found, arguments.directory / "predicted-vs-measured.png")


if __name__ == "__main__":
    main()
