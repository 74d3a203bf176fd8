"""What a measured frontier says: where its knee is, how much that depends on the range, and how far prices are off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def fit_gains(
    labels: Sequence[str], costs: Sequence[Mapping[str, float]], measured: Sequence[float]
) -> dict[str, Any] | None:
    """By what a format's prices would have to be multiplied to give what was measured.

    Plan i has the predicted cost costs[i][format] of its groups in each format, and measured[i] nats per token. Gains
    minimise the squared relative error, Σ (Σ_f gain_f cost_if / measured_i − 1)². `fitted` predicts each plan by the
    gains of all others, so that no plan explains itself. None unless there are two plans more than formats.
    """
    formats = sorted({name for cost in costs for name, value in cost.items() if value > 0})
    used = [index for index, value in enumerate(measured) if value > 0]
    if not formats or len(used) < len(formats) + 2:
        return None
    rows = np.array([[costs[index].get(name, 0.0) / measured[index] for name in formats] for index in used])

    def gains(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.linalg.lstsq(rows[chosen], np.ones(int(chosen.sum())), rcond=None)[0]
        return found

    everyone = np.ones(len(used), dtype=np.bool_)
    fitted = {}
    for place, index in enumerate(used):
        others = everyone.copy()
        others[place] = False
        fitted[labels[index]] = float(rows[place] @ gains(others)) * measured[index]
    return {
        "gain": dict(zip(formats, gains(everyone).tolist(), strict=True)),
        "plans": len(used),
        "fitted": fitted,
    }
