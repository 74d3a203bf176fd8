"""`verify`: re-read the repository at `store.output` against the run and the source."""

from __future__ import annotations

from rich.console import Console

from jobs.commands.progress import run_progress
from jobs.pipeline import assembly
from jobs.pipeline.assembly import VerifiedRepository
from prismaquant_ray.config import Config
from prismaquant_ray.formatting import verified


def run(config: Config) -> VerifiedRepository:
    """Check the repository that is there, whatever budget it was made for. Exit code 2 when it is wrong."""
    with run_progress() as progress:
        return assembly.verify(config, on_event=progress)


def render(result: VerifiedRepository, console: Console) -> None:
    """The verdict, then every problem."""
    counts = ", ".join(f"{count} {name}" for name, count in result.linears.items() if count)
    verdict = verified(named_by=result.named_by) if result.ok else f"{len(result.problems)} problems"
    console.print(
        f"{result.repository}: {verdict}; {result.tensors} tensors, {counts} Linears, "
        f"{result.total_bytes / 1e6:,.1f} MB, {result.bpp:.4f} bits per parameter"
    )
    for problem in result.problems:
        console.print(f"  {problem}")
