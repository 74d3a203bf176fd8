"""`allocate`: the plan for the budget, from stored measurements."""

from __future__ import annotations

from rich.console import Console

from jobs.commands.progress import run_progress
from jobs.pipeline.refinement import chosen_plan
from jobs.pipeline.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.formatting import plan_times, server_memory
from prismaquant_ray.records import PlanRecord


def run(config: Config) -> PlanRecord:
    """Measure what is missing, then solve."""
    with run_progress() as progress:
        current = Run(config, on_event=progress)
        return current.repairing(lambda known: chosen_plan(current, known))


def render(plan: PlanRecord, console: Console) -> None:
    """Print one plan."""
    formats = ", ".join(f"{count} {name}" for name, count in plan.groups.items() if count)
    console.print(
        f"{plan.target}: {plan.bpp:.4f} bits per parameter, predicted loss "
        f"{plan.predicted_loss:.5f} ± {plan.standard_error:.5f} nats/token, gap {plan.gap:.1e}"
    )
    console.print(
        f"  groups: {formats}; repository at most {plan.repository_bytes_at_most / 1e6:,.1f} MB, "
        f"{plan.loaded_bytes / 1e6:,.1f} MB as loaded"
    )
    if plan.kv_cache == "fp8":
        console.print(
            f"  KV cache in FP8: {plan.kv_cache_loss:.5f} ± {plan.kv_cache_error:.5f} nats/token of the predicted loss"
        )
    console.print(f"  {plan_times(plan.times)}")
    if plan.vram is not None:
        console.print(f"  vram: {server_memory(plan.vram)}")
