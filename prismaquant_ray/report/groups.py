"""Prices and bytes of fused groups, and sums of them: by kind of module, by format, with one format everywhere.

Predicted losses shown to people are summed only here. Losses are nats per token; those of a draft head have the plan's
weight. A missing figure is None, and so is a sum with such a term.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.backward.cost_table import Objective
from prismaquant_ray.block_records import BackwardRecord, Price
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Block, BlockKind, Layout
from prismaquant_ray.report.findings import FormatFindings
from prismaquant_ray.report.group_findings import (
    BlockFindings,
    Composition,
    DraftFindings,
    FormatShare,
    GroupColumns,
    ModuleShare,
    Share,
)
from prismaquant_ray.report.run_data import RunData


def inside(name: str, block: Block) -> str:
    """A module's name within its block; it does not depend on the layer."""
    return name.removeprefix(f"{block.prefix}.") if block.prefix else name


def label(kind: str, module: str) -> str:
    """A module's name for people, with the kind of block outside the decoder."""
    return module if kind == BlockKind.DECODER else f"{kind}: {module}"


def encoded(choice: Mapping[str, FormatName], layout: Layout) -> str:
    """A choice as one letter per group, in layout order."""
    return "".join(FORMATS[choice[group.name]].letter for group in layout.groups)


def decoded(letters: str, formats: Sequence[FormatFindings]) -> list[str]:
    """The name of the format of every group of a plan."""
    names = {entry.letter: entry.name for entry in formats}
    return [names[letter] for letter in letters]


def group_columns(data: RunData, objective: Objective) -> GroupColumns:
    """Prices under an objective, and bytes, of every group in every format."""
    layout, table, sizes = data.layout, data.table, data.sizes
    cost = table.cost(objective)
    known = objective == "token_fisher"
    error = table.standard_error if known else np.full_like(cost, np.nan)
    blocks = [layout.block_of[group.name] for group in layout.groups]

    def by_format(values: NDArray[Any]) -> dict[str, list[Any]]:
        return {
            str(name): [None if math.isnan(value) else value for value in values[:, column].tolist()]
            for column, name in enumerate(table.formats)
        }

    return GroupColumns(
        name=[group.name for group in layout.groups],
        block=[block.index for block in blocks],
        module=[inside(group.name, block) for group, block in zip(layout.groups, blocks, strict=True)],
        parameters=[group.parameters for group in layout.groups],
        experts=[group.experts for group in layout.groups],
        linears=[len(group.linears) for group in layout.groups],
        bytes=_bytes(sizes),
        cost=by_format(cost),
        standard_error=by_format(error),
        weight_cost=_parts(data, (lambda price, factor: factor * price.weight_cost) if known else _unknown),
        activation_cost=_parts(data, (lambda price, _: price.activation_cost) if known else _unknown),
    )


def _bytes(sizes: Sizes) -> dict[str, list[int | None]]:
    return {
        str(name): [
            size if allowed else None
            for size, allowed in zip(sizes.weights[:, column].tolist(), sizes.allowed[:, column].tolist(), strict=True)
        ]
        for column, name in enumerate(sizes.formats)
    }


def _parts(data: RunData, part: Any) -> dict[str, list[float | None]]:
    """One part of every price; 0 for BF16."""
    return {
        str(name): [_part_of(data, group.name, name, part) for group in data.layout.groups]
        for name in data.table.formats
    }


def _unknown(price: Price, factor: float) -> None:
    """The trace does not know parts."""


def _part_of(data: RunData, group: str, name: FormatName, part: Any) -> float | None:
    if FORMATS[name].codec is None:
        return 0.0
    block = data.layout.block_of[group]
    price: Price | None = data.backward[block.index].groups[group].get(name)
    value: float | None = None if price is None else part(price, data.table.optimism[name].factor)
    weight = data.config.allocation.mtp_weight if block.kind is BlockKind.DRAFT else 1.0
    return None if value is None else weight * value


# Sums -----------------------------------------------------------------------------------------------------------------


def total(values: Iterable[float | None]) -> float | None:
    """The sum, or None if a value is None."""
    listed = list(values)
    there = [value for value in listed if value is not None]
    if len(there) < len(listed):
        return None
    return math.fsum(there) if any(isinstance(value, float) for value in there) else sum(there)


def root_sum_square(errors: Iterable[float | None]) -> float | None:
    """The standard error of a sum of independent terms."""
    return None if (squares := total(None if e is None else e * e for e in errors)) is None else math.sqrt(squares)


def predicted_loss(columns: GroupColumns, chosen: Sequence[str]) -> float | None:
    """Predicted loss of a plan, given as the format of every group."""
    return total(columns.cost[name][row] for row, name in enumerate(chosen))


def share(columns: GroupColumns, rows: Sequence[int], chosen: Sequence[str]) -> Share:
    """Sums over some groups of a plan; `chosen` has the format of every group."""

    def of(column: Mapping[str, list[Any]]) -> list[Any]:
        return [column[chosen[row]][row] for row in rows]

    parameters: Counter[str] = Counter()
    for row in rows:
        parameters[chosen[row]] += columns.parameters[row]
    size, everything = sum(of(columns.bytes)), sum(parameters.values())
    cost, weights = total(of(columns.cost)), total(of(columns.weight_cost))
    activations = total(of(columns.activation_cost))
    known = cost is not None and weights is not None and activations is not None
    return Share(
        groups=len(rows),
        parameters=everything,
        parameters_by_format=dict(parameters),
        bytes=size,
        bits=8 * size / everything if everything else None,
        cost=cost,
        standard_error=root_sum_square(of(columns.standard_error)),
        weight_cost=weights,
        activation_cost=activations,
        cross_cost=cost - weights - activations if known else None,  # type: ignore[operator]
    )


def composition(
    columns: GroupColumns, blocks: Sequence[BlockFindings], formats: Sequence[FormatFindings], choice: str
) -> Composition:
    """Bytes and predicted loss of a plan by module and format; `choice` has one letter per group."""
    chosen, kinds = decoded(choice, formats), {block.index: block.kind for block in blocks}
    modules: dict[tuple[str, str], list[int]] = {}
    for row, module in enumerate(columns.module):
        modules.setdefault((kinds[columns.block[row]], module), []).append(row)
    rows_of = {entry.name: [row for row, name in enumerate(chosen) if name == entry.name] for entry in formats}
    return Composition(
        modules=[
            ModuleShare(kind=kind, module=module, label=label(kind, module), **asdict(share(columns, rows, chosen)))
            for (kind, module), rows in modules.items()
        ],
        formats=[FormatShare(format=name, **asdict(share(columns, rows, chosen))) for name, rows in rows_of.items()],
        all=share(columns, range(len(chosen)), chosen),
    )


# Draft head -----------------------------------------------------------------------------------------------------------


def agreement(layout: Layout, backward: Mapping[int, BackwardRecord]) -> dict[str, float] | None:
    """Top-1 agreement of the draft head with the model, by format of the whole head; None without a draft head."""
    for block in layout.of(BlockKind.DRAFT):
        return dict(backward[block.index].agreement or {})
    return None


def draft(data: RunData, columns: GroupColumns, formats: Sequence[FormatFindings]) -> DraftFindings | None:
    """Findings of the draft head; None without one."""
    for block in data.layout.of(BlockKind.DRAFT):
        rows = [row for row, index in enumerate(columns.block) if index == block.index]
        return DraftFindings(
            prefix=block.prefix,
            groups=len(rows),
            agreement=agreement(data.layout, data.backward) or {},
            tokens=data.backward[block.index].tokens,
            weight=data.config.allocation.mtp_weight,
            predicted_loss={entry.name: total(columns.cost[entry.name][row] for row in rows) for entry in formats},
        )
    return None
