"""Findings as the page and the plots arrange them: the map, the most sensitive groups, the spread of rounding gains."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from prismaquant_ray.layout import BlockKind
from prismaquant_ray.report.findings import Findings
from prismaquant_ray.report.group_findings import BlockFindings, LinearGain
from prismaquant_ray.report.groups import decoded, label

_TITLES = {
    BlockKind.DECODER: "Decoder",
    BlockKind.VISION: "Vision tower",
    BlockKind.MERGER: "Vision tower",
    BlockKind.DRAFT: "Draft and output head",
    BlockKind.HEAD: "Draft and output head",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MapRow:
    """A module in every block of a part: the row of its group, None where a block does not have it."""

    module: str
    cells: list[int | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class MapSection:
    """Layers × modules of one part of the model; a column for each block."""

    title: str
    columns: list[str]
    rows: list[MapRow]


def sections(findings: Findings) -> list[MapSection]:
    """The map, a table for each part of the model, the decoder first."""
    rows_of: dict[int, dict[str, int]] = {}
    for row, (index, module) in enumerate(zip(findings.groups.block, findings.groups.module, strict=True)):
        rows_of.setdefault(index, {})[module] = row
    parts: dict[str, list[BlockFindings]] = {}
    for block in findings.blocks:
        if block.index in rows_of:
            parts.setdefault(_TITLES[BlockKind(block.kind)], []).append(block)
    found = []
    for title, blocks in parts.items():
        modules = list(dict.fromkeys(module for block in blocks for module in rows_of[block.index]))
        rows = [
            MapRow(module=module, cells=[rows_of[block.index].get(module) for block in blocks]) for module in modules
        ]
        found.append(MapSection(title=title, columns=[block.label for block in blocks], rows=rows))
    return sorted(found, key=lambda part: part.title != _TITLES[BlockKind.DECODER])


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitiveGroup:
    """A group, its format in the plan, and its `cost` in the smallest format that it can take.

    `costs` are cost and standard error by format, BF16 left out.
    """

    name: str
    parameters: int
    format: str
    smallest: str
    cost: float
    costs: dict[str, tuple[float | None, float | None]]


def sensitive(findings: Findings) -> list[SensitiveGroup]:
    """Every group, by falling cost in its smallest format."""
    columns, names = findings.groups, [entry.name for entry in findings.formats]
    found = []
    for row, (name, chosen) in enumerate(
        zip(columns.name, decoded(findings.plan.choice, findings.formats), strict=True)
    ):
        prices = {format_: columns.cost[format_][row] for format_ in names}
        smallest, cost = next((format_, price) for format_, price in prices.items() if price is not None)
        found.append(
            SensitiveGroup(
                name=name,
                parameters=columns.parameters[row],
                format=chosen,
                smallest=smallest,
                cost=cost,
                costs={
                    format_: (price, columns.standard_error[format_][row])
                    for format_, price in prices.items()
                    if format_ != "BF16"
                },
            )
        )
    return sorted(found, key=lambda entry: -entry.cost)


def least_gained(findings: Findings, most: int) -> list[LinearGain]:
    """Linears in the model's order: where there are more than `most`, those that rounding gained least for."""
    linears = findings.rounding.linears
    worst = sorted(range(len(linears)), key=lambda row: -(linears[row].shipped or 0.0))[:most]
    return [linears[row] for row in sorted(worst)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StripRow:
    """The Linears of one kind: ratios as shipped, one per layer, and their median."""

    label: str
    median: float
    ratios: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """The spread of the rounding gain of one codec and the formats that share it."""

    codec: str
    formats: list[str]
    rows: list[StripRow]


def strips(findings: Findings) -> list[Strip]:
    """Ratios as shipped, by codec and kind of Linear."""
    kinds = {block.index: block.kind for block in findings.blocks}
    found: dict[str, dict[str, list[float]]] = {}
    for entry in findings.rounding.linears:
        if entry.shipped is not None:
            name = label(kinds[entry.block], entry.module)
            found.setdefault(entry.codec, {}).setdefault(name, []).append(entry.shipped)
    return [
        Strip(
            codec=codec,
            formats=findings.rounding.codecs[codec].formats,
            rows=[
                StripRow(label=name, median=statistics.median(ratios), ratios=ratios)
                for name, ratios in modules.items()
            ],
        )
        for codec, modules in found.items()
    ]
