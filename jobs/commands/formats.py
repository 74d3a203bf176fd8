"""`formats`: the table of formats, and which of a model's groups can take each."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from jobs.pipeline.format_table import FormatTable, format_table
from prismaquant_ray.config import Config


def run(config: Config | None) -> FormatTable:
    """Every format; with a configuration also the number of fused groups of its model that can take each."""
    return format_table(config)


def render(result: FormatTable, console: Console) -> None:
    """The table, and what serves each format."""
    table = Table(box=None, pad_edge=False)
    columns = ["format", "bits", "compressed-tensors format", "runtime needs", "what it is"]
    with_model = result.formats[0].groups is not None
    for title in [*columns, *(["fused groups"] if with_model else [])]:
        table.add_column(title)
    for entry in result.formats:
        row = [entry.format, f"{entry.bits:.3f}", entry.compression, entry.served_by.needs, entry.summary]
        table.add_row(*row, *([f"{entry.groups} of {entry.of}"] if with_model else []))
    console.print(table)
    for entry in result.formats:
        console.print(f"{entry.format}: {entry.served_by.conditions}.", highlight=False, soft_wrap=True)
