"""Positions of the frontier's points, in percent of the plot, on a linear and a logarithmic loss axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prismaquant_ray import formatting
from prismaquant_ray.records import Divergence
from prismaquant_ray.report.findings import Findings, MeasuredLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """An interval of values, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float | None:
        """Percent from the low end; None if a logarithmic axis cannot show the value."""
        low, high = self.low, self.high
        if self.log:
            if value <= 0:
                return None
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 100 * (min(max(value, low), high) - low) / (high - low)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers on it: 1, 2 or 5 times a power of ten."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            powers = range(first, last + 1)
            found = [float(f"{m}e{power}") for power in powers for m in (1, 2, 5)]
            inside = [value for value in found if self.low <= value <= self.high]
            return inside if len(inside) <= 10 else [value for value in inside if f"{value:e}"[0] == "1"]
        step = 10 ** math.floor(math.log10((self.high - self.low) / about))
        step = next(step * m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= about)
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A mark of one `series` at `bpp` bits and `loss` ± `error` nats per token; `text` is its tooltip."""

    series: str
    label: str
    bpp: float
    loss: float
    error: float | None
    text: str


#: Series in the order they are drawn and explained.
SERIES = {
    "plan": "plan of a target, predicted",
    "budget": "plan of the budget, predicted",
    "knee": "knee of the frontier",
    "uniform": "one format everywhere, predicted",
    "measured": "plan, measured KL, weights and activations rounded",
    "measured-weights": "plan, measured KL, weights rounded only",
    "measured-uniform": "one format everywhere, measured KL",
    "mixture": "formats mixed evenly, same bytes, measured KL",
    "by_hand": "formats by hand, NVFP4 and FP8, measured KL",
    "fisher_trace": "plan by diagonal Fisher, measured KL",
}


_NOTHING = MeasuredLosses(weights=None, activations=None)


def points(findings: Findings) -> list[Point]:
    """Every mark of the frontier chart."""
    found = list(_plans(findings))
    for entry in findings.uniform:
        if entry.predicted_loss is None or entry.bpp is None or entry.format == "BF16":
            continue
        label = f"all {entry.format}"
        found.append(_point("uniform", label, entry.bpp, entry.predicted_loss, entry.standard_error, "predicted loss"))
        found += _kl("measured-uniform", label, entry.bpp, (entry.measured or _NOTHING).activations)
    if findings.knee:
        knee = findings.knee
        found.append(_point("knee", "knee", knee.bpp, knee.predicted_loss, None, "predicted loss"))
    for other in findings.measured.others if findings.measured else ():
        if other.kind in SERIES:
            found += _kl(other.kind, other.label, other.bpp, other.activations)
    return found


def _plans(findings: Findings) -> Iterator[Point]:
    for place, plan in enumerate(findings.plans):
        series = "budget" if place == findings.budget else "plan"
        label = formatting.target(plan.target)
        yield _point(series, label, plan.bpp, plan.predicted_loss, plan.standard_error, "predicted loss")
        measured = plan.measured or _NOTHING
        yield from _kl("measured", label, plan.bpp, measured.activations)
        yield from _kl("measured-weights", label, plan.bpp, measured.weights, ", weights rounded only")


def _kl(series: str, label: str, bpp: float, found: Divergence | None, what: str = "") -> Iterator[Point]:
    if found is not None:
        yield _point(series, label, bpp, found.kl_mean, found.kl_standard_error, f"measured KL{what}")


def _point(series: str, label: str, bpp: float, loss: float, error: float | None, what: str) -> Point:
    text = f"{label}: {what} {formatting.with_error(loss, error)} nats per token at {bpp:.4f} bits per parameter"
    return Point(series=series, label=label, bpp=bpp, loss=loss, error=error, text=text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """The frontier chart: axes, marks and the line of the whole frontier in percent (x from the left, y from above)."""

    x: Axis
    linear: Axis
    log: Axis
    points: list[Point]
    line: list[tuple[float, float]]
    log_line: list[tuple[float, float]]

    @property
    def series(self) -> dict[str, str]:
        """The legend: series that have a mark."""
        there = {point.series for point in self.points}
        return {key: text for key, text in SERIES.items() if key in there}

    def style(self, point: Point) -> str:
        """CSS variables of a mark: x, and on both axes y and the ends of its error bar, where they exist."""
        values: list[tuple[str, float | None]] = [("x", self.x.place(point.bpp))]
        error = point.error or 0.0
        for name, axis in (("y", self.linear), ("l", self.log)):
            values.append((name, _down(axis, point.loss)))
            if error:
                values += [(f"{name}0", _down(axis, point.loss + error)), (f"{name}1", _down(axis, point.loss - error))]
        return ";".join(f"--{name}:{value:.2f}%" for name, value in values if value is not None)


def _down(axis: Axis, value: float) -> float | None:
    place = axis.place(value)
    return None if place is None else 100 - place


def chart(findings: Findings) -> Chart:
    """Axes that hold every mark; the frontier is clipped to them."""
    marks = points(findings)
    xs = [point.bpp for point in marks]
    margin = max(0.02, 0.03 * (max(xs) - min(xs)))
    x = Axis(low=min(xs) - margin, high=max(xs) + margin)
    tops = [point.loss + (point.error or 0.0) for point in marks]
    positive = [point.loss for point in marks if point.loss > 0] or [1e-6]
    high = max(*tops, 1e-9)
    linear = Axis(low=0.0, high=1.06 * high)
    log = Axis(low=min(positive) / 1.3, high=max(high, 2 * min(positive)) * 1.3, log=True)
    curve = findings.frontier
    corners = [(bpp, loss) for bpp, loss in zip(curve.bpp, curve.predicted_loss, strict=True) if x.low <= bpp <= x.high]
    return Chart(
        x=x,
        linear=linear,
        log=log,
        points=sorted(marks, key=lambda point: list(SERIES).index(point.series)),
        line=_line(corners, x, linear),
        log_line=_line([(bpp, loss) for bpp, loss in corners if loss >= log.low], x, log),
    )


def _line(corners: Sequence[tuple[float, float]], x: Axis, y: Axis) -> list[tuple[float, float]]:
    found = []
    for bpp, loss in corners:
        across, down = x.place(bpp), _down(y, loss)
        if across is not None and down is not None:
            found.append((round(across, 2), round(down, 2)))
    return found
