"""The report's plots as PNG, for slides and documents: the same findings as the page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure

from prismaquant_ray import formatting
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.report import chart
from prismaquant_ray.report.arrangement import sections, sensitive, strips
from prismaquant_ray.report.findings import Findings
from prismaquant_ray.report.surface_chart import COLOURS, curve_label

_DPI = 150
#: Marker, colour and whether it is filled, by series of the frontier.
_MARKS = {
    "plan": ("o", "#15569c", True),
    "budget": ("o", "#15569c", True),
    "knee": ("D", "#12705a", False),
    "uniform": ("s", "#576073", False),
    "measured": ("^", "#b3480a", False),
    "measured-weights": ("v", "#b3480a", False),
    "measured-uniform": ("s", "#b3480a", False),
    "mixture": ("x", "#7a3f9c", True),
    "by_hand": ("D", "#7a3f9c", False),
    "fisher_trace": ("+", "#7a3f9c", True),
}
_MOST = 20


def plots(findings: Findings) -> dict[str, bytes]:
    """PNG files by name; those of figures that a run does not have are left out."""
    figures = {
        "frontier": _frontier(findings),
        "format_map": _format_map(findings),
        "sensitivity": _sensitivity(findings),
        "most_sensitive": _most_sensitive(findings),
        "rounding": _rounding(findings),
    }
    if findings.composition.all.cross_cost is not None:
        figures["cost_split"] = _cost_split(findings)
    if findings.surface:
        figures["surface"] = _surface(findings)
    if findings.experts:
        figures["experts"] = _experts(findings)
    return {name: _png(figure, name, findings) for name, figure in figures.items()}


def _png(figure: Figure, name: str, findings: Findings) -> bytes:
    data = io.BytesIO()
    title = f"{findings.model.title}: {name.replace('_', ' ')}"
    FigureCanvasAgg(figure)
    figure.savefig(data, format="png", dpi=_DPI, metadata={"Title": title, "Software": "prismaquant-ray"})
    return data.getvalue()


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _titled(axes, title)
    return figure, axes


def _titled(axes: Axes, title: str) -> None:
    # Dollar signs in names are not formulas.
    axes.set_title(_short(title, 90), loc="left", fontsize=11, fontweight="bold", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)


def _rows(axes: Axes, names: Sequence[str], at: Sequence[int] | None = None, size: int = 8) -> None:
    """Name the rows, as text and not as formulas."""
    shortened = [_short(name, 56) for name in names]
    axes.set_yticks(range(len(names)) if at is None else at, shortened, fontsize=size, parse_math=False)


def _short(text: str, most: int) -> str:
    """Long text without its middle."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - most // 2 + 1 :]}"


def _frontier(findings: Findings) -> Figure:
    figure, axes = _figure(9, 5, f"{findings.model.title}: loss against bits")
    found = chart.chart(findings)
    line = findings.frontier
    axes.plot(line.bpp, line.predicted_loss, color="#15569c", alpha=0.5, label="every best plan, predicted")
    for series, text in found.series.items():
        marker, colour, filled = _MARKS[series]
        points = [point for point in found.points if point.series == series]
        size = 12 if series == "budget" else 6
        axes.errorbar(
            [point.bpp for point in points],
            [point.loss for point in points],
            yerr=[point.error or 0.0 for point in points],
            fmt=marker,
            color=colour,
            markersize=size,
            markerfacecolor=colour if filled and series != "budget" else "none",
            markeredgewidth=1.6,
            label=text,
        )
    axes.set(
        xlim=(found.x.low, found.x.high),
        ylim=(found.linear.low, found.linear.high),
        xlabel="bits per quantizable parameter",
        ylabel="nats per token",
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _surface(findings: Findings) -> Figure:
    """The least loss over bits, one line for each limit on prefill."""
    plan = findings.plan
    figure, axes = _figure(9, 5, f"{findings.model.title}: loss against bits and time of a prompt's token")
    for colour, curve in zip(COLOURS, findings.surface, strict=False):
        loss = [value if value > 0 else math.nan for value in curve.predicted_loss]
        axes.plot(curve.bpp, loss, color=colour, linewidth=2)
        name, end = curve_label(curve), (curve.bpp[-1], loss[-1])
        axes.annotate(name, end, (6, 0), textcoords="offset points", color=colour, fontsize=9, va="center")
    axes.plot(plan.bpp, plan.predicted_loss, "o", color="black", markerfacecolor="none", markersize=9)
    left, right = axes.get_xlim()
    axes.set(yscale="log", ylabel="nats per token, predicted", xlim=(left, right + 0.14 * (right - left)))
    basis = (
        f"prefill: time of the Linears, relative to {formatting.times_basis(plan.times)}; ring: the plan of the budget"
    )
    axes.set_xlabel(f"bits per quantizable parameter\n({basis})", parse_math=False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.grid(which="both", axis="y", alpha=0.3)
    return figure


def _format_map(findings: Findings) -> Figure:
    plan = findings.plan
    letters = [entry.letter for entry in findings.formats]
    colours = ListedColormap([FORMATS[FormatName(entry.name)].colours[0] for entry in findings.formats])
    norm = BoundaryNorm(np.arange(len(letters) + 1) - 0.5, len(letters))
    title = f"{findings.model.title}, {formatting.target(plan.target)}: format of every fused group"

    def draw(axes: Axes, rows: np.ndarray[Any, Any]) -> None:
        columns = np.array([[math.nan if g < 0 else letters.index(plan.choice[g]) for g in row] for row in rows])
        axes.imshow(columns, cmap=colours, norm=norm, aspect="auto")
        if rows.shape[1] <= 100:
            for (y, x), group in np.ndenumerate(rows):
                if group >= 0:
                    _, ink = FORMATS[FormatName(findings.formats[int(columns[y, x])].name)].colours
                    axes.text(x, y, plan.choice[group], color=ink, ha="center", va="center", fontsize=6)

    figure = _maps(findings, title, draw)
    names = ", ".join(f"{entry.letter} = {entry.name}" for entry in findings.formats)
    figure.supxlabel(f"layer    ({names})", fontsize=9)
    return figure


def _sensitivity(findings: Findings) -> Figure:
    """Cost of every group in the smallest format of the run, on a log scale."""
    name = findings.formats[0].name
    costs = [math.nan if cost is None or cost <= 0 else cost for cost in findings.groups.cost[name]]
    there = [cost for cost in costs if not math.isnan(cost)] or [1e-9, 1.0]
    norm = LogNorm(vmin=min(there), vmax=max(*there, 1.01 * min(there)))

    def draw(axes: Axes, rows: np.ndarray[Any, Any]) -> None:
        values = np.array([[math.nan if g < 0 else costs[g] for g in row] for row in rows])
        image = axes.imshow(values, cmap="cividis", norm=norm, aspect="auto")
        axes.figure.colorbar(image, ax=axes, label="nats per token", pad=0.01)

    figure = _maps(findings, f"{findings.model.title}: predicted loss of each group alone in {name}", draw)
    figure.supxlabel("layer", fontsize=9)
    return figure


def _maps(findings: Findings, title: str, draw: Any) -> Figure:
    """One map of layers × modules per part of the model; `draw` gets group indices, −1 for none."""
    parts = sections(findings)
    heights = [len(part.rows) + 1 for part in parts]
    widest = max(len(part.columns) for part in parts)
    figure = Figure(figsize=(min(24, 3 + 0.22 * max(widest, 20)), 1.2 + 0.3 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)
    for place, (part, axes) in enumerate(zip(parts, all_axes[:, 0], strict=True)):
        rows = np.array([[-1 if cell is None else cell for cell in row.cells] for row in part.rows])
        draw(axes, rows)
        _rows(axes, [row.module for row in part.rows])
        step = max(1, len(part.columns) // 32)
        axes.set_xticks(range(0, len(part.columns), step), part.columns[::step], fontsize=7)
        _titled(axes, title if place == 0 else part.title)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def _most_sensitive(findings: Findings) -> Figure:
    rows = sensitive(findings)[:_MOST]
    figure, axes = _figure(9, 1.4 + 0.27 * len(rows), f"{findings.model.title}: the most sensitive groups")
    errors = [row.costs[row.smallest][1] or 0.0 if row.smallest in row.costs else 0.0 for row in rows]
    axes.barh(range(len(rows)), [row.cost for row in rows], xerr=errors, color="#15569c", ecolor="#576073")
    _rows(axes, [f"{row.name}, {row.smallest}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("predicted loss, nats per token ± one standard error")
    return figure


def _cost_split(findings: Findings) -> Figure:
    rows = findings.composition.modules
    plan = findings.plan
    title = f"{findings.model.title}, {formatting.target(plan.target)}: predicted loss by cause"
    figure, axes = _figure(9, 1.4 + 0.35 * len(rows), title)
    weights = [row.weight_cost or 0.0 for row in rows]
    activations = [row.activation_cost or 0.0 for row in rows]
    axes.barh(range(len(rows)), weights, color="#15569c", label="weights")
    axes.barh(range(len(rows)), activations, left=weights, color="#e8853d", label="activations")
    _rows(axes, [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("nats per token; what comes from both together is left out")
    axes.legend(frameon=False)
    return figure


def _rounding(findings: Findings) -> Figure:
    found = strips(findings)
    heights = [len(strip.rows) + 1 for strip in found]
    figure = Figure(figsize=(9, 1.2 + 0.24 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(max(1, len(found)), 1, squeeze=False, sharex=True, height_ratios=heights or None)
    for strip, axes in zip(found, all_axes[:, 0], strict=False):
        for place, row in enumerate(strip.rows):
            axes.scatter(row.ratios, [place] * len(row.ratios), s=12, alpha=0.45, color="#15569c", linewidths=0)
            axes.plot([row.median] * 2, [place - 0.35, place + 0.35], color="black", linewidth=1.5)
        _rows(axes, [row.label for row in strip.rows])
        axes.invert_yaxis()
        axes.set_xlim(0, max(1.02, *(ratio for row in strip.rows for ratio in row.ratios)))
        _titled(axes, f"{', '.join(strip.formats)}: held-out output error against round-to-nearest")
    figure.supxlabel("ratio as shipped (1: no gain)", fontsize=9)
    return figure


def _experts(findings: Findings) -> Figure:
    """Tokens of every expert of every layer, each layer's experts from the least used to the most used."""
    rows = findings.experts
    widest = max(row.experts for row in rows)
    tokens = np.full((len(rows), widest), math.nan)
    for place, row in enumerate(rows):
        tokens[place, : row.experts] = sorted(row.tokens)
    figure, axes = _figure(9, 1.6 + 0.16 * len(rows), f"{findings.model.title}: calibration tokens of every expert")
    # Experts without tokens stay white on the log scale.
    shown_ = np.where(tokens > 0, tokens, math.nan)
    top = max(2.0, float(np.nanmax(tokens)))
    image = axes.imshow(shown_, cmap="cividis", norm=LogNorm(vmin=1, vmax=top), aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="tokens (white: none)", pad=0.01)
    step = max(1, len(rows) // 24)
    _rows(axes, [row.group for row in rows[::step]], at=range(0, len(rows), step), size=7)
    axes.set_xlabel("experts, from the least used to the most used")
    return figure
