"""What was measured of plans, joined to the plans of a report: only figures of exactly these plans are theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prismaquant_ray.errors import StoreError

Facts = dict[str, Any]
#: What the report shows of a target, and the plan before interactions.
Choices = tuple[Mapping[str, str], Mapping[str, str]]
_NEEDED = ("text", "source", "plans")


def join(
    plans: Sequence[Facts], uniform: Sequence[Facts], measured: Mapping[str, Any] | None, choices: Mapping[str, Choices]
) -> Facts | None:
    """Put what plans/measured.json says of them into the plans and uniform controls of a report, under `measured`.

    `choices` has for every target the choice of the plan that the report shows, and of the plan before it was refined
    with interactions. A measurement of another choice is none of this plan. What remains (mixtures, other objectives)
    is returned, with the text and the source's figures; None when nothing was measured.

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
        shown, additive = choices.get(target, (None, None))
        name = str(found["label"]).removeprefix("all ")
        if kind in ("plan", "interactions") and found.get("choice") == shown:
            by_target[target]["measured"] = _figures(found)
        elif kind == "uniform" and name in by_format:
            by_format[name]["measured"] = _figures(found)
        elif kind == "plan" and found.get("choice") != additive:
            stale.append(found["label"])
        else:
            kept = ("kind", "label", "target", "bpp", "weight_bytes", "objective", "predicted_loss")
            others.append({**{key: found.get(key) for key in kept}, **_figures(found)})
    return {
        "text": dict(measured["text"]),
        "calibration_tokens": measured.get("calibration_tokens"),
        "source": dict(measured["source"]),
        "knee": measured.get("knee"),
        "fit": measured.get("fit"),
        "others": others,
        "stale": stale,
    }


def _figures(found: Mapping[str, Any]) -> Facts:
    return {
        "weights": found.get("weights"),
        "activations": found.get("activations"),
        "predicted_with_interactions": found.get("predicted_with_interactions"),
    }
