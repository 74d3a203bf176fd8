"""`sweep`: the frontier at every target, and its knee."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from jobs import frontier, planning
from jobs.run import Run
from prismaquant_ray.config import Config


def run(config: Config, *, measure: bool = False) -> dict[str, Any]:
    """Probe what is missing, then solve every target in one go; `measure` evaluates every one of them, and controls."""
    current = Run(config)
    if measure:
        frontier.check(current)
    result = current.repairing(lambda: planning.sweep_targets(current))
    if measure:
        result["measured"] = current.repairing(lambda: frontier.measured_sweep(current, result))
    return result


def render(result: dict[str, Any], console: Console) -> None:
    """The frontier as a table."""
    table = Table(box=None, pad_edge=False)
    names = list(result["targets"][0]["groups"])
    for title in ("target", "bpp", "predicted nats/token", "±", "gap", *names, "MB at most"):
        table.add_column(title, justify="right")
    for plan in result["targets"]:
        table.add_row(
            plan["target"],
            f"{plan['bpp']:.4f}",
            f"{plan['predicted_loss']:.5f}",
            f"{plan['standard_error']:.5f}",
            f"{plan['gap']:.0e}",
            *(str(plan["groups"][name]) for name in names),
            f"{plan['repository_bytes_at_most'] / 1e6:,.1f}",
        )
    console.print(table)
    if result["out_of_reach"]:
        console.print(f"no plan exists for: {', '.join(f'{target:g}' for target in result['out_of_reach'])}")
    knee = result["knee"]
    if knee is None:
        console.print("knee: the frontier has fewer than three points between the targets")
    else:
        console.print(
            f"knee: {knee['bpp']:.3f} bits per parameter at {knee['predicted_loss']:.5f} nats/token "
            f"(frontier from {knee['from_bpp']:.3f} to {knee['to_bpp']:.3f})"
        )
    if "measured" in result:
        console.print()
        frontier.render(result["measured"], console)
