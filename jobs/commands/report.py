"""`report`: the findings of a run, as one HTML page, its JSON and PNGs."""

from __future__ import annotations

from rich.console import Console

from jobs.commands.progress import run_progress
from jobs.pipeline.reporting import WrittenReport, report
from jobs.pipeline.run import Run
from prismaquant_ray.config import Config


def run(config: Config, *, out: str | None = None) -> WrittenReport:
    """Measure what is missing, then write the report below `report/` of the run store, or into `out`."""
    with run_progress() as progress:
        return report(Run(config, on_event=progress), out=out)


def render(result: WrittenReport, console: Console) -> None:
    """Print the paths of the report."""
    for path in result.files:
        console.print(path, soft_wrap=True)
    if not any(path.endswith(".png") for path in result.files):
        console.print("no PNGs: they need matplotlib, which pip install 'prismaquant-ray[plots]' brings", markup=False)
    if not result.measured:
        console.print("losses are predicted, not measured: run sweep --measure, then report again")
