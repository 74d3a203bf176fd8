"""`export-recipe CONFIG OUT`: the plan for the budget as the input of llm-compressor and ModelOpt."""

from __future__ import annotations

from rich.console import Console

from jobs.commands.progress import run_progress
from jobs.pipeline.recipes import ExportedRecipe, check_recipe_place, export_recipe
from jobs.pipeline.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.repository.recipes import Tool


def run(config: Config, *, out: str, tools: tuple[str, ...] = ()) -> ExportedRecipe:
    """Measure what is missing, solve, then write a file for each tool."""
    check_recipe_place(out)
    chosen = tuple(map(Tool, tools)) or tuple(Tool)
    with run_progress() as progress:
        return Run(config, on_event=progress).repairing(lambda known: export_recipe(known, known.plan, out, chosen))


def render(result: ExportedRecipe, console: Console) -> None:
    """Print the files, and what is in them."""
    for path in result.files:
        console.print(path, soft_wrap=True)
    counts = ", ".join(f"{count} {name}" for name, count in result.linears.items() if count)
    console.print(f"  {result.plan.target}: {counts} Linears of transformers' model", soft_wrap=True)
    console.print("  the choice alone: equalization, searched scales, GPTQ's rounding and prices do not travel")
    if result.absent:
        console.print(f"  {len(result.absent)} Linears, {result.absent[0]} the first, are not in transformers' model")
