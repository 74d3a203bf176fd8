"""`quantize`: everything, from the source to a verified repository."""

from __future__ import annotations

from rich.console import Console

from jobs.commands import assemble, evaluation_table, probe, sweep
from jobs.commands.progress import run_progress
from jobs.pipeline.stages import Quantized, quantize
from prismaquant_ray.config import Config


def run(config: Config, *, fresh: bool = False) -> Quantized:
    """Run every stage that is not done."""
    with run_progress() as progress:
        return quantize(config, fresh=fresh, on_event=progress)


def render(result: Quantized, console: Console) -> None:
    """The summary on the terminal."""
    probe.render(result.probe, console)
    console.print()
    sweep.render(result.sweep, console)
    console.print()
    if result.evaluation is not None:
        evaluation_table.render(result.evaluation, console)
        console.print()
    assemble.render(result.repository, console)
    seconds = result.seconds
    evaluated = "" if result.evaluation is None else f"evaluated in {seconds.evaluate:.0f} s, "
    console.print(
        f"source {result.source_bytes / 1e6:,.1f} MB -> {result.repository.total_bytes / 1e6:,.1f} MB; measured in "
        f"{seconds.measure:.0f} s, {evaluated}planned and assembled in {seconds.plan_and_assemble:.1f} s, "
        f"peak of a worker {result.probe.peak_worker_bytes / 1e9:.2f} GB"
    )
