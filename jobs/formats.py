"""`formats`: the table of formats, and what of a model each can hold."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from prismaquant_ray.config import Config
from prismaquant_ray.formats import FORMATS
from prismaquant_ray.formats.fitting import refusal
from prismaquant_ray.formats.servability import SERVABILITY

_EXAMPLE = (4096, 4096)


def run(config: Config | None) -> dict[str, Any]:
    """Every format; with a configuration also how many fused groups of its model can take each."""
    groups = None
    if config is not None:
        from jobs.run import Run

        groups = Run(config).layout.groups
    entries = []
    for name, spec in FORMATS.items():
        entry: dict[str, Any] = {
            "format": str(name),
            "bits": spec.bits(*_EXAMPLE),
            "compression": spec.compression,
            "summary": spec.summary,
            "served_by": SERVABILITY[name].as_dict(),
        }
        if groups is not None:
            entry["groups"] = sum(refusal(name, group) is None for group in groups)
            entry["of"] = len(groups)
        entries.append(entry)
    return {"formats": entries}


def render(result: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(box=None, pad_edge=False)
    columns = ["format", "bits", "compressed-tensors format", "runtime needs", "what it is"]
    with_model = "groups" in result["formats"][0]
    for title in [*columns, *(["fused groups"] if with_model else [])]:
        table.add_column(title)
    for entry in result["formats"]:
        row = [
            entry["format"],
            f"{entry['bits']:.3f}",
            entry["compression"],
            entry["served_by"]["needs"],
            entry["summary"],
        ]
        table.add_row(*row, *([f"{entry['groups']} of {entry['of']}"] if with_model else []))
    console.print(table)
