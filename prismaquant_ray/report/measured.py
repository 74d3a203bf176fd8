"""What was measured of plans, joined to the plans of a report: only figures of exactly these plans are theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prismaquant_ray.errors import StoreError

Facts = dict[str, Any]
_NEEDED = ("text", "source", "plans")


def join(
    plans: Sequence[Facts],
    uniform: Sequence[Facts],
    measured: Mapping[str, Any] | None,
    choices: Mapping[str, Mapping[str, str]],
) -> Facts | None:
    """Put what plans/measured.json says of them into the plans and uniform controls of a report, under `measured`.

    `choices` has the choice of every target's plan. A measurement of another choice is none of this plan. What remains
    (mixtures, other objectives) is returned, with the text and the source's figures; None when nothing was measured.

    Raises:
        StoreError: the measurements are not what they should be.
    """
    for entry in (*plans, *uniform):
        entry["measured"] = None
    if measured is None:
        return None
    missing = [key for key in _NEEDED if key not in measured]
    if missing:
        raise StoreError(f"plans/measured.json lacks {', '.join(missing)}; run sweep --measure again")
    by_target = {plan["target"]: plan for plan in plans}
    by_format = {entry["format"]: entry for entry in uniform}
    others, stale = [], []
    for found in measured["plans"]:
        kind, target = found["kind"], found.get("target")
        name = str(found["label"]).removeprefix("all ")
        if kind == "plan" and target in choices and found.get("choice") == choices[target]:
            by_target[target]["measured"] = _figures(found)
        elif kind == "plan":
            stale.append(found["label"])
        elif kind == "uniform" and name in by_format:
            by_format[name]["measured"] = _figures(found)
        else:
            kept = ("kind", "label", "target", "bpp", "weight_bytes", "objective", "predicted_loss")
            others.append({**{key: found.get(key) for key in kept}, **_figures(found)})
    return {
        "text": dict(measured["text"]),
        "calibration_tokens": measured.get("calibration_tokens"),
        "source": dict(measured["source"]),
        "knee": measured.get("knee"),
        "others": others,
        "stale": stale,
    }


def _figures(found: Mapping[str, Any]) -> Facts:
    return {"weights": found.get("weights"), "activations": found.get("activations")}
