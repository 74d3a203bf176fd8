"""The knee of a measured frontier, and its stability under shorter ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prismaquant_ray.allocation.frontier import knee
from prismaquant_ray.records import KneeRange, MeasuredKnee

# Three points allow only one knee, the middle one.
_POINTS = 4


def measured_knee(points: Sequence[tuple[float, float]]) -> MeasuredKnee | None:
    """Kneedle's knee of measured (bits per parameter, KL) points, and the knees over shorter ranges.

    `stability` has the knee of the same curve without its first, its last, and both ends. None for fewer than four
    points.
    """
    ordered = sorted(dict(points).items())
    if len(ordered) < _POINTS:
        return None
    ranges = {(first, len(ordered) - last) for first in (0, 1) for last in (0, 1)}
    found = {(start, stop): _knee(ordered[start:stop]) for start, stop in sorted(ranges) if stop - start >= _POINTS - 1}
    whole = found.pop((0, len(ordered)))
    stability = [KneeRange(from_bpp=each.from_bpp, to_bpp=each.to_bpp, bpp=each.bpp) for each in found.values()]
    return replace(whole, stability=stability)


def _knee(points: Sequence[tuple[float, float]]) -> MeasuredKnee:
    bits, kl = zip(*points, strict=True)
    index = knee(bits, kl)
    return MeasuredKnee(bpp=bits[index], kl=kl[index], from_bpp=bits[0], to_bpp=bits[-1], stability=[])
