"""Handing a plan over to other quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.pipeline.measured import Measured
from prismaquant_ray import __version__
from prismaquant_ray.formats import FormatName
from prismaquant_ray.records import PlanRecord, PlanSummary
from prismaquant_ray.repository.recipes import FILES, Tool, recipe_text, transformers_plan
from prismaquant_ray.storage.connection import local_path
from prismaquant_ray.storage.store import Store, check_directory


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedRecipe:
    """The files, the plan that they are of, and what it gives transformers' Linears.

    `absent` are Linears that the plan quantizes and transformers does not load.
    """

    files: list[str]
    plan: PlanSummary
    linears: dict[FormatName, int]
    absent: list[str]


def check_recipe_place(out: str) -> None:
    """InputError or StoreError unless files can be written there."""
    path = local_path(out)
    if path is None:
        Store(out, create=False).check_writable()
    else:
        check_directory(path)


def export_recipe(known: Measured, plan: PlanRecord, out: str, tools: Sequence[Tool] = tuple(Tool)) -> ExportedRecipe:
    """Write the files of these tools to `out`, a directory or URI: all of them or, where one cannot be made, none.

    Raises:
        InputError: a tool does not have a format, or cannot name a part of the model, or `out` is no place for files.
    """
    check_recipe_place(out)
    found = transformers_plan(known.source, known.layout, plan.choice)
    title = (
        f"The plan {plan.target} of prismaquant-ray {__version__} for {known.layout.architecture}, {plan.bpp:.4f} bits "
        "per parameter"
    )
    texts = {FILES[tool]: recipe_text(tool, found, title) for tool in tools}
    store = Store(out)
    for name, text in texts.items():
        store.put(name, text.encode())
    return ExportedRecipe(
        files=[f"{store.uri.rstrip('/')}/{name}" for name in texts],
        plan=plan.summary,
        linears=found.counts,
        absent=list(found.absent),
    )
