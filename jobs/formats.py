"""`formats`: the table of formats, and what of a model each can hold."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from prismaquant_ray.config import Config
from prismaquant_ray.formats import FORMATS
from prismaquant_ray.formats.servability import SERVABILITY

_EXAMPLE = (4096, 4096)


def run(config: Config | None) -> dict[str, Any]:
    """Every format; with a configuration also how many Linears of its model can take each."""
    linears = None
    if config is not None:
        from jobs.run import Run

        linears = list(Run(config).layout.linears())
    entries = []
    for name, spec in FORMATS.items():
        entry: dict[str, Any] = {
            "format": str(name),
            "bits": spec.bits(*_EXAMPLE),
            "compression": spec.compression,
            "summary": spec.summary,
            "served_by": SERVABILITY[name].as_dict(),
        }
        if linears is not None:
            refusals = [spec.refusal(item.out_features, item.in_features) for item in linears]
            entry["linears"] = sum(reason is None for reason in refusals)
            entry["of"] = len(refusals)
        entries.append(entry)
    return {"formats": entries}


def render(result: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(box=None, pad_edge=False)
    columns = ["format", "bits", "compressed-tensors format", "runtime needs", "what it is"]
    with_model = "linears" in result["formats"][0]
    for title in [*columns, *(["Linears"] if with_model else [])]:
        table.add_column(title)
    for entry in result["formats"]:
        row = [
            entry["format"],
            f"{entry['bits']:.3f}",
            entry["compression"],
            entry["served_by"]["needs"],
            entry["summary"],
        ]
        table.add_row(*row, *([f"{entry['linears']} of {entry['of']}"] if with_model else []))
    console.print(table)
