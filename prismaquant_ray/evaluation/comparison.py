"""What a measured frontier says: where its knee is, and how much that depends on the range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prismaquant_ray.allocation.frontier import knee

# A knee needs three points; a range that could have it anywhere but in the middle needs more.
_POINTS = 4


def knee_of(points: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """Kneedle's knee of measured (bits per parameter, KL) points, and what it is over shorter ranges.

    `stability` has the knee of the same curve without its first, its last, and both ends. None for fewer than four
    points.
    """
    ordered = sorted(dict(points).items())
    if len(ordered) < _POINTS:
        return None
    ranges = {(first, len(ordered) - last) for first in (0, 1) for last in (0, 1)}
    found = {(start, stop): _knee(ordered[start:stop]) for start, stop in sorted(ranges) if stop - start >= _POINTS - 1}
    whole = found.pop((0, len(ordered)))
    return {
        **whole,
        "stability": [{key: each[key] for key in ("from_bpp", "to_bpp", "bpp")} for each in found.values()],
    }


def _knee(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    bits, kl = zip(*points, strict=True)
    index = knee(bits, kl)
    return {"bpp": bits[index], "kl": kl[index], "from_bpp": bits[0], "to_bpp": bits[-1]}
