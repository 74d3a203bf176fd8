"""The picture of loss over bytes and time: positions of one line for each limit on prefill, in percent of the plot."""

from __future__ import annotations

from dataclasses import dataclass

from prismaquant_ray.report.chart import Axis
from prismaquant_ray.report.findings import Findings, SurfaceCurve

#: Colours of the lines, from the tightest limit to none, as `report.css` has them for light paper.
COLOURS = ("#7a0f3c", "#b3480a", "#8a6500", "#3f7319", "#12705a", "#15569c")


@dataclass(frozen=True, kw_only=True, slots=True)
class SurfaceLine:
    """A line with its name and its place in `COLOURS`; corners are x from the left and y from above."""

    label: str
    place: int
    corners: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SurfaceChart:
    """Axes, lines, and the plan of the budget as a point."""

    x: Axis
    y: Axis
    lines: list[SurfaceLine]
    plan: tuple[float, float] | None


def surface_chart(findings: Findings) -> SurfaceChart | None:
    """The chart; None where a run has no surface."""
    curves = findings.surface
    costs = [cost for curve in curves for cost in curve.predicted_loss if cost > 0]
    if not costs:
        return None
    bits = [bpp for curve in curves for bpp in curve.bpp]
    width = max(bits) - min(bits) or 0.1
    # Room for the names at the right ends of the lines.
    x = Axis(low=min(bits) - 0.03 * width, high=max(bits) + 0.17 * width)
    y = Axis(low=min(costs) / 1.15, high=1.15 * max(costs), log=True)
    plan = findings.plan
    inside = x.low <= plan.bpp <= x.high and y.low <= plan.predicted_loss <= y.high
    return SurfaceChart(
        x=x,
        y=y,
        lines=[
            SurfaceLine(label=curve_label(curve), place=place, corners=_corners(x, y, curve))
            for place, curve in enumerate(curves)
        ],
        plan=_corner(x, y, plan.bpp, plan.predicted_loss) if inside else None,
    )


def curve_label(curve: SurfaceCurve) -> str:
    """The limit of a line in words."""
    return "no limit" if curve.prefill is None else f"prefill ≤ {curve.prefill:g}"


def _corners(x: Axis, y: Axis, curve: SurfaceCurve) -> list[tuple[float, float]]:
    each = zip(curve.bpp, curve.predicted_loss, strict=True)
    return [corner for bpp, loss in each if (corner := _corner(x, y, bpp, loss)) is not None]


def _corner(x: Axis, y: Axis, bpp: float, loss: float) -> tuple[float, float] | None:
    left, up = x.place(bpp), y.place(loss)
    return None if left is None or up is None else (round(left, 2), round(100 - up, 2))
