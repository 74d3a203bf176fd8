"""`assemble`: the repository for the budget's plan, verified before it is put in place."""

from __future__ import annotations

from rich.console import Console

from jobs.commands.progress import run_progress
from jobs.pipeline.assembly import AssembledRepository, assemble
from jobs.pipeline.refinement import chosen_plan
from jobs.pipeline.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.formatting import verified


def run(config: Config, *, fresh: bool = False) -> AssembledRepository:
    """Measure and allocate what is missing, then copy the chosen candidates."""
    with run_progress() as progress:
        current = Run(config, fresh=fresh, on_event=progress)
        current.check()
        with current.claimed():
            return current.repairing(lambda known: assemble(current, known, chosen_plan(current, known)))


def render(result: AssembledRepository, console: Console) -> None:
    """Print the size and bits of the repository."""
    console.print(
        f"{result.repository}: {result.total_bytes / 1e6:,.1f} MB, {result.bpp:.4f} bits per quantizable "
        f"parameter, {result.bits_all_parameters:.3f} per parameter of the whole model; "
        f"{verified(named_by=result.named_by)}"
    )
