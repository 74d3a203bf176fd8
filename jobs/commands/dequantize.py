"""`dequantize REPO OUT`: the BF16 weights of a compressed-tensors repository, as a repository; needs nothing else."""

from __future__ import annotations

from rich.console import Console

from jobs.pipeline.dequantizing import dequantize
from prismaquant_ray.compressed.dequantize import DequantizedRepository


def run(repo: str, out: str) -> DequantizedRepository:
    """Decode every quantized weight."""
    return dequantize(repo, out)


def render(result: DequantizedRepository, console: Console) -> None:
    """Print modules and sizes, then notes."""
    modules = ", ".join(f"{count} {name}" for name, count in result.modules.items())
    console.print(
        f"{result.repository}: {modules or 'no'} modules as BF16, {result.bytes_before / 1e6:,.1f} MB of weights "
        f"→ {result.bytes_after / 1e6:,.1f} MB",
        soft_wrap=True,
    )
    for note in result.notes:
        console.print(f"  {note}", soft_wrap=True)
