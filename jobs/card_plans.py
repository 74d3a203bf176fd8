"""What a run store knows of plans beside the one on a card: those of the sweep, and what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import planning
from jobs.run import Run
from prismaquant_ray.errors import InputError
from prismaquant_ray.report.card_facts import Divergence, Knee, Measured, SweepRow

# Budgets of a sweep that a card shows: this one and its neighbours.
_BUDGETS = 12
_LONGEST_NAME = 120


def named(location: Path | str) -> str:
    """A place as the user wrote it; of a local one outside the working directory, or a long one, the name."""
    path = Path(location)
    if "://" in str(location):
        return str(location)
    return path.name if path.is_absolute() or ".." in path.parts or len(str(path)) > _LONGEST_NAME else str(path)


def predicted_loss(run: Run, choice: Mapping[str, str]) -> float:
    """Predicted loss in nats per token, whatever the plan was chosen by."""
    return _sum(run, choice, run.table.token_fisher)


def _sum(run: Run, choice: Mapping[str, str], costs: Any) -> float:
    columns = {str(name): column for column, name in enumerate(run.table.formats)}
    return math.fsum(costs[row, columns[choice[group]]] for row, group in enumerate(run.table.groups))


def _swept(run: Run) -> dict[str, Any] | None:
    """The plans of every target of the sweep, made anew so that a card does not depend on what was asked before it.

    None when no target is within reach of the formats.
    """
    try:
        return planning.sweep_targets(run)
    except InputError:
        return None


def sweep_rows(run: Run, plan: Mapping[str, Any]) -> tuple[tuple[SweepRow, ...], int]:
    """This plan among those of the sweep, and how many budgets farther away are left out."""
    sweep = _swept(run)
    others = [target for target in (sweep["targets"] if sweep else []) if target["target"] != plan["target"]]
    plans = sorted([*others, plan], key=lambda target: (target["bpp"], target is not plan))
    place = next(index for index, target in enumerate(plans) if target is plan)
    start = max(0, min(place - _BUDGETS // 2, len(plans) - _BUDGETS))
    shown = plans[start : start + _BUDGETS]
    plans_measured = {json.dumps(entry["choice"], sort_keys=True): entry for entry in reversed(_measured_plans(run))}
    rows = []
    for target in shown:
        found = plans_measured.get(json.dumps(target["choice"], sort_keys=True), {})
        rows.append(
            SweepRow(
                target=target["target"],
                bpp=target["bpp"],
                predicted=predicted_loss(run, target["choice"]),
                counts=target["groups"],
                bytes_at_most=target["repository_bytes_at_most"],
                measured_weights=(found.get("weights") or {}).get("kl_mean"),
                measured_activations=(found.get("activations") or {}).get("kl_mean"),
                chosen=target is plan,
            )
        )
    return tuple(rows), len(plans) - len(shown)


def knee(run: Run) -> Knee | None:
    """Of the frontier between the targets of the sweep."""
    found = (_swept(run) or {}).get("knee")
    return None if found is None else Knee(bpp=found["bpp"], from_bpp=found["from_bpp"], to_bpp=found["to_bpp"])


def _measured_plans(run: Run) -> list[dict[str, Any]]:
    plans: list[dict[str, Any]] = (run.stored("plans/measured.json", made_by="sweep --measure") or {}).get("plans", [])
    return plans


def measured(run: Run, plan: Mapping[str, Any]) -> Measured | None:
    """What was measured of exactly this choice."""
    entry = next((entry for entry in _measured_plans(run) if entry["choice"] == plan["choice"]), None)
    if entry is None:
        return None
    weights, activations = _divergence(entry.get("weights")), _divergence(entry.get("activations"))
    if weights is None and activations is None:
        return None
    body = run.stored("plans/measured.json", made_by="sweep --measure") or {}
    text, source = body["text"], body.get("source") or {}
    return Measured(
        file=named(text["file"]),
        sha256=text["sha256"],
        tokens=text["tokens"],
        images=text.get("images", 0),
        source_perplexity=source.get("perplexity"),
        source_draft_agreement=source.get("draft_agreement"),
        weights=weights,
        activations=activations,
    )


def _divergence(body: Mapping[str, Any] | None) -> Divergence | None:
    if body is None:
        return None
    keys = ("kl_standard_error", "kl_p99", "top1_agreement", "perplexity", "draft_agreement")
    return Divergence(kl_mean=body["kl_mean"], **{key: body.get(key) for key in keys})
