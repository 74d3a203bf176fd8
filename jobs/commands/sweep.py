"""`sweep`: a plan for every target, and the knee of the frontier; with `--measure` also their measured losses."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from jobs.commands import evaluation_table
from jobs.commands.progress import run_progress
from jobs.pipeline.run import Run
from jobs.pipeline.stages import MeasuredSweep, sweep_and_measure
from prismaquant_ray.config import Config
from prismaquant_ray.formatting import times_basis
from prismaquant_ray.records import SweepRecord


def run(config: Config, *, measure: bool = False) -> SweepRecord:
    """Measure what is missing, then solve every target in one go; `measure` evaluates every one, and baselines."""
    with run_progress() as progress:
        current = Run(config, on_event=progress)
        return sweep_and_measure(current) if measure else current.repairing(lambda known: known.sweep)


def render(result: SweepRecord, console: Console) -> None:
    """The frontier as a table."""
    table = Table(box=None, pad_edge=False)
    names = list(result.targets[0].groups)
    for title in ("target", "bpp", "predicted nats/token", "±", "gap", "prefill", "decode", *names, "MB at most"):
        table.add_column(title, justify="right")
    for plan in result.targets:
        table.add_row(
            plan.target,
            f"{plan.bpp:.4f}",
            f"{plan.predicted_loss:.5f}",
            f"{plan.standard_error:.5f}",
            f"{plan.gap:.0e}",
            f"{plan.times.prefill:.3f}",
            f"{plan.times.decode:.3f}",
            *(str(plan.groups[name]) for name in names),
            f"{plan.repository_bytes_at_most / 1e6:,.1f}",
        )
    console.print(table)
    console.print(f"prefill and decode: relative to {times_basis(result.targets[0].times)}", soft_wrap=True)
    if result.out_of_reach:
        console.print(f"no plan exists for: {', '.join(f'{target:g}' for target in result.out_of_reach)}")
    knee = result.knee
    if knee is None:
        console.print("knee: the frontier has fewer than three points between the targets")
    else:
        console.print(
            f"knee: {knee.bpp:.3f} bits per parameter at {knee.predicted_loss:.5f} nats/token "
            f"(frontier from {knee.from_bpp:.3f} to {knee.to_bpp:.3f})"
        )
    if isinstance(result, MeasuredSweep):
        console.print()
        evaluation_table.render(result.measured, console)
