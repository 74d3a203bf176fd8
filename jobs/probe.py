"""`probe`: both passes, nothing chosen."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.console import Console

from actors.schedule.units import Stage
from jobs.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.forward.encode import by_matrix
from prismaquant_ray.layout import BlockKind


def run(config: Config, *, fresh: bool = False) -> dict[str, Any]:
    """Measure what is missing and say what was found."""
    current = Run(config, fresh=fresh)
    current.measure()
    return current.repairing(lambda: summary(current))


def summary(current: Run) -> dict[str, Any]:
    """Counts, the most sensitive groups and what rounding gained."""
    table = current.table
    gains: dict[str, list[float]] = {}
    methods: dict[str, dict[str, int]] = {}
    for record in current.records[Stage.FORWARD].values():
        for codecs in record.metrics["linears"].values():
            for codec, figures in codecs.items():
                for method, errors in by_matrix(figures):
                    if errors["nearest"] > 0:
                        gains.setdefault(codec, []).append(errors[method] / errors["nearest"])
                    counts = methods.setdefault(codec, {})
                    counts[method] = counts.get(method, 0) + 1
    sensitive: list[dict[str, Any]] = []
    for column, name in enumerate(table.formats):
        for row, group in enumerate(table.groups):
            cost = float(table.token_fisher[row, column])
            if cost > 0:
                error = float(table.standard_error[row, column])
                sensitive.append({"group": group, "format": str(name), "cost": cost, "standard_error": error})
    sensitive.sort(key=lambda entry: entry["cost"], reverse=True)
    return {
        "run": current.store.uri,
        "blocks": len(current.layout.blocks),
        "groups": len(table.groups),
        "tokens": current.config.calibration.sequences * current.config.calibration.length,
        "uniform_loss": {
            str(name): _total([float(value) for value in table.token_fisher[:, column]])
            for column, name in enumerate(table.formats)
        },
        "holdout_error_to_nearest": {codec: _geometric_mean(ratios) for codec, ratios in gains.items()},
        "methods": methods,
        "most_sensitive": sensitive[:10],
        "experts": _experts(current),
        "draft_agreement": _draft_agreement(current),
        "peak_worker_bytes": json.loads(current.store.get("measured.json"))["peak_bytes"],
    }


def _experts(current: Run) -> dict[str, dict[str, Any]]:
    """Calibration tokens of every routed expert, by layer, with what most needs to be known of them."""
    found = {}
    for record in current.records[Stage.FORWARD].values():
        for name, tokens in record.metrics["experts"].items():
            found[name] = {"tokens": tokens, "fewest": min(tokens), "unseen": sum(count == 0 for count in tokens)}
    return found


def _draft_agreement(current: Run) -> dict[str, float] | None:
    """How often the draft head's best guess is the model's: as it is (BF16), and with all of it in a format."""
    for block in current.layout.of(BlockKind.DRAFT):
        agreement: dict[str, float] = current.records[Stage.BACKWARD][block.index].metrics["agreement"]
        return agreement
    return None


def _total(costs: list[float]) -> float | None:
    """Predicted loss with every group in one format; None where some group cannot take it."""
    total = math.fsum(costs)
    return None if math.isnan(total) else total


def _geometric_mean(ratios: list[float]) -> float:
    return math.exp(math.fsum(math.log(max(ratio, 1e-12)) for ratio in ratios) / len(ratios))


def render(result: dict[str, Any], console: Console) -> None:
    """What was measured, for people."""
    console.print(f"measured {result['groups']} groups in {result['blocks']} blocks over {result['tokens']:,} tokens")
    for name, loss in result["uniform_loss"].items():
        console.print(f"  all {name:<9} predicted loss {'not possible' if loss is None else f'{loss:.4f} nats/token'}")
    for codec, ratio in result["holdout_error_to_nearest"].items():
        wins = ", ".join(f"{method} {count}" for method, count in sorted(result["methods"][codec].items()))
        console.print(f"  {codec:<13} held-out output error {ratio:.3f} of round-to-nearest ({wins})")
    if result["experts"]:
        fewest = min(entry["fewest"] for entry in result["experts"].values())
        unseen = sum(entry["unseen"] for entry in result["experts"].values())
        console.print(
            f"  experts of {len(result['experts'])} layers: {fewest:,} calibration tokens at least, {unseen} saw none"
        )
    if result["draft_agreement"]:
        shown = ", ".join(f"{name} {share:.3f}" for name, share in result["draft_agreement"].items())
        console.print(f"  draft head agrees with the model's best guess: {shown}")
    console.print("most sensitive:")
    for entry in result["most_sensitive"][:5]:
        console.print(f"  {entry['cost']:.5f} ± {entry['standard_error']:.5f}  {entry['format']:<8} {entry['group']}")
