"""`explain CONFIG NAME`: why a module has its format, or none."""

from __future__ import annotations

from rich.console import Console

from jobs.commands.progress import run_progress
from jobs.pipeline.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.report.explanation import Explanation, explain


def run(config: Config, name: str) -> Explanation:
    """Measure what is missing, then look the module up in the plan of the configured budget."""
    with run_progress() as progress:
        return Run(config, on_event=progress).repairing(lambda known: explain(known.planner, known.plan, name))


def render(result: Explanation, console: Console) -> None:
    """The reason, then the price of every alternative."""
    for line in result.lines():
        console.print(line, soft_wrap=True)
