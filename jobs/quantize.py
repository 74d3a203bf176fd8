"""`quantize`: everything, from the source to a verified repository."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from jobs import assemble, frontier, planning, probe, sweep
from jobs.run import Run
from prismaquant_ray.config import Config


def run(config: Config, *, fresh: bool = False) -> dict[str, Any]:
    """Run every stage that is not done."""
    started = time.monotonic()
    current = Run(config, fresh=fresh)
    current.check()
    if config.evaluation is not None:
        frontier.check(current)
    with current.claimed():
        current.measure()
        measured = time.monotonic()
        plan = current.repairing(lambda: planning.allocate(current))
        evaluated = current.repairing(lambda: _evaluated(current, plan))
        known = time.monotonic()
        result = current.repairing(lambda: _outcome(current, plan))
        result["evaluation"] = evaluated
        result["seconds"] = {
            "measure": measured - started,
            "evaluate": known - measured,
            "plan_and_assemble": time.monotonic() - known,
        }
        return result


def _evaluated(current: Run, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The plan's loss, where the configuration says on what; before it is assembled, so that its card can say it."""
    return None if current.config.evaluation is None else frontier.measured_plan(current, plan)


def _outcome(current: Run, plan: dict[str, Any]) -> dict[str, Any]:
    """Everything that follows from what was measured."""
    return {
        "probe": probe.summary(current),
        "sweep": planning.sweep_targets(current),
        "repository": assemble.build(current, plan),
        "source_bytes": sum(info.nbytes for info in current.source.stored.values()),
    }


def render(result: dict[str, Any], console: Console) -> None:
    """The summary on the terminal."""
    probe.render(result["probe"], console)
    console.print()
    sweep.render(result["sweep"], console)
    console.print()
    if result["evaluation"] is not None:
        frontier.render(result["evaluation"], console)
        console.print()
    assemble.render(result["repository"], console)
    seconds, repository = result["seconds"], result["repository"]
    evaluated = "" if result["evaluation"] is None else f"evaluated in {seconds['evaluate']:.0f} s, "
    console.print(
        f"source {result['source_bytes'] / 1e6:,.1f} MB -> {repository['total_bytes'] / 1e6:,.1f} MB; measured in "
        f"{seconds['measure']:.0f} s, {evaluated}planned and assembled in {seconds['plan_and_assemble']:.1f} s, "
        f"peak of a worker {result['probe']['peak_worker_bytes'] / 1e9:.2f} GB"
    )
