"""What the HTML report says of a model and its plans, as plain JSON values: pure functions of what a run stored.

Losses are nats per token; a draft head's are weighted as the plan weights them. A figure that does not exist is None.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.backward.cost_table import CostTable, Objective
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formats.servability import SERVABILITY
from prismaquant_ray.forward.encode import by_matrix
from prismaquant_ray.layout import Block, BlockKind, Layout

Facts = dict[str, Any]
#: Figures of each block's record, by index.
Records = Mapping[int, Mapping[str, Any]]

#: What stands for a format in a choice and on the map, so that nobody has to tell colours apart.
LETTERS = {
    FormatName.INT4: "I",
    FormatName.MXFP4: "X",
    FormatName.NVFP4: "N",
    FormatName.NVFP4A16: "A",
    FormatName.FP8: "F",
    FormatName.MXFP8: "M",
    FormatName.BF16: "B",
}
#: An expert is cold when it saw less than this share of what it would see if all were used equally.
COLD = 0.1
_EXAMPLE = (4096, 4096)


def formats_of(names: Iterable[FormatName]) -> list[Facts]:
    """The formats of a run, smallest first."""
    chosen = set(names)
    return [
        {
            "name": str(name),
            "letter": LETTERS[name],
            "bits": spec.bits(*_EXAMPLE),
            "codec": spec.codec.name if spec.codec else None,
            "summary": spec.summary,
            "needs": SERVABILITY[name].as_dict()["needs"],
        }
        for name, spec in FORMATS.items()
        if name in chosen
    ]


def blocks_of(layout: Layout) -> list[Facts]:
    """Every block: kind, module path, and the label of its column on the map."""
    return [
        {"index": block.index, "kind": str(block.kind), "prefix": block.prefix, "label": _label(block)}
        for block in layout.blocks
    ]


def _label(block: Block) -> str:
    return block.prefix.rpartition(".")[2] or "head"


def inside(name: str, block: Block) -> str:
    """A module's name within its block; the same for the same module of every layer."""
    return name.removeprefix(f"{block.prefix}.") if block.prefix else name


def label(kind: str, module: str) -> str:
    """What people read: the decoder's modules by their name, others with what they are part of."""
    return module if kind == BlockKind.DECODER else f"{kind}: {module}"


def groups_of(
    layout: Layout, table: CostTable, sizes: Sizes, backward: Records, *, objective: Objective, draft_weight: float
) -> Facts:
    """Columns with an entry for every fused group; those by format hold None where the group cannot take it.

    `weight_cost` and `activation_cost` are the parts of `cost` that rounding weights alone and rounding activations
    alone would cause (the rest is their cross term); None where the records lack them. `standard_error` belongs to the
    objective token_fisher and is None with another one.
    """
    cost = table.cost(objective)
    error = table.standard_error if objective == "token_fisher" else np.full_like(cost, np.nan)
    columns = {name: column for column, name in enumerate(table.formats)}
    blocks = [layout.block_of[group.name] for group in layout.groups]

    def by_format(values: NDArray[Any]) -> dict[str, list[Any]]:
        return {str(name): [_number(value) for value in values[:, column]] for name, column in columns.items()}

    def part(key: str) -> dict[str, list[float | None]]:
        found: dict[str, list[float | None]] = {}
        for name in table.formats:
            entries: list[float | None] = []
            found[str(name)] = entries
            for group, block in zip(layout.groups, blocks, strict=True):
                if FORMATS[name].codec is None:
                    entries.append(0.0)
                    continue
                value: float | None = backward[block.index]["groups"][group.name].get(name, {}).get(key)
                weight = draft_weight if block.kind is BlockKind.DRAFT else 1.0
                entries.append(None if value is None or objective != "token_fisher" else weight * value)
        return found

    return {
        "name": [group.name for group in layout.groups],
        "block": [block.index for block in blocks],
        "module": [inside(group.name, block) for group, block in zip(layout.groups, blocks, strict=True)],
        "parameters": [group.parameters for group in layout.groups],
        "experts": [group.experts for group in layout.groups],
        "linears": [len(group.linears) for group in layout.groups],
        "bytes": by_format(np.where(sizes.allowed, sizes.weights.astype(np.float64), np.nan)),
        "cost": by_format(cost),
        "standard_error": by_format(error),
        "weight_cost": part("weight_cost"),
        "activation_cost": part("activation_cost"),
    }


def _number(value: float) -> float | int | None:
    value = float(value)
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() and abs(value) > 1 else value


def encoded(choice: Mapping[str, str], groups: Facts) -> str:
    """A plan as one letter a group, in the groups' order."""
    return "".join(LETTERS[FormatName(choice[name])] for name in groups["name"])


def uniform_of(groups: Facts, formats: Sequence[Facts], sizes: Sizes) -> list[Facts]:
    """Every group in one format; figures are None where some group cannot take it."""
    parameters = sum(groups["parameters"])
    stored = {str(name): int(sizes.stored[:, i].sum()) + sizes.fixed for i, name in enumerate(sizes.formats)}
    found = []
    for name in (entry["name"] for entry in formats):
        size, cost = total(groups["bytes"][name]), total(groups["cost"][name])
        errors = groups["standard_error"][name]
        found.append(
            {
                "format": name,
                "bpp": None if size is None else 8 * size / parameters,
                "weight_bytes": size,
                "repository_bytes_at_most": None if size is None else stored[name],
                "predicted_loss": cost,
                "standard_error": None if cost is None else root_sum_square(errors),
            }
        )
    return found


def total(values: Iterable[float | None]) -> float | int | None:
    """The sum; None when a part of it does not exist."""
    listed = list(values)
    there = [value for value in listed if value is not None]
    if len(there) < len(listed):
        return None
    return math.fsum(there) if any(isinstance(value, float) for value in there) else sum(there)


def root_sum_square(errors: Iterable[float | None]) -> float | None:
    """The standard error of a sum whose parts are taken as independent."""
    return None if (squares := total(None if e is None else e * e for e in errors)) is None else math.sqrt(squares)


# A plan, taken apart ----------------------------------------------------------------------------------------


def composition(groups: Facts, blocks: Sequence[Facts], formats: Sequence[Facts], choice: str) -> Facts:
    """Where the bits of a plan went and what they cost, by kind of module and by format.

    The split of a loss is None where the records do not have it.
    """
    names = {entry["letter"]: entry["name"] for entry in formats}
    chosen = [names[letter] for letter in choice]
    modules: dict[tuple[str, str], list[int]] = {}
    for row, module in enumerate(groups["module"]):
        modules.setdefault((blocks[groups["block"][row]]["kind"], module), []).append(row)
    return {
        "modules": [
            {"kind": kind, "module": module, "label": label(kind, module), **_part(groups, rows, chosen)}
            for (kind, module), rows in modules.items()
        ],
        "formats": [
            {
                "format": entry["name"],
                **_part(groups, [row for row, name in enumerate(chosen) if name == entry["name"]], chosen),
            }
            for entry in formats
        ],
        "all": _part(groups, range(len(chosen)), chosen),
    }


def _part(groups: Facts, rows: Sequence[int], chosen: Sequence[str]) -> Facts:
    def of(key: str) -> list[Any]:
        return [groups[key][chosen[row]][row] for row in rows]

    parameters: Counter[str] = Counter()
    for row in rows:
        parameters[chosen[row]] += groups["parameters"][row]
    size, everything = sum(of("bytes")), sum(parameters.values())
    cost, weights, activations = total(of("cost")), total(of("weight_cost")), total(of("activation_cost"))
    known = None not in (cost, weights, activations)
    return {
        "groups": len(rows),
        "parameters": everything,
        "parameters_by_format": dict(parameters),
        "bytes": size,
        "bits": 8 * size / everything if everything else None,
        "cost": cost,
        "standard_error": root_sum_square(of("standard_error")),
        "weight_cost": weights,
        "activation_cost": activations,
        "cross_cost": cost - weights - activations if known else None,  # type: ignore[operator]
    }


# What rounding gained ---------------------------------------------------------------------------------------


def rounding_of(layout: Layout, formats: Iterable[FormatName], forward: Records) -> Facts:
    """Held-out output error of every Linear against round-to-nearest, by codec.

    `ratio` has an entry for each way that was tried, `shipped` is that of the way that won. For experts both are
    medians over those that can be judged (round-to-nearest makes an error on tokens that they saw), `low` and `high`
    the first and last decile of what ships. None where nothing can be judged.
    """
    users: dict[str, list[str]] = {}
    for name in formats:
        codec = FORMATS[name].codec
        if codec is not None:
            users.setdefault(codec.name, []).append(str(name))
    linears: list[Facts] = []
    every: dict[str, list[tuple[str, dict[str, float]]]] = {name: [] for name in codecs_of(formats)}
    for block in layout.blocks:
        figures = forward[block.index]["linears"]
        for linear in block.linears:
            for codec_name, found in figures[linear.name].items():
                matrices = list(by_matrix(found))
                every[codec_name] += matrices
                linears.append(
                    {
                        "linear": linear.name,
                        "block": block.index,
                        "module": inside(linear.name, block),
                        "codec": codec_name,
                        "experts": linear.experts,
                        **_gain(matrices, statistics.median),
                    }
                )
    codecs = {
        name: {"formats": users[name], "matrices": len(matrices), **_gain(matrices, statistics.geometric_mean)}
        for name, matrices in every.items()
    }
    return {"codecs": codecs, "linears": linears}


def _gain(matrices: Sequence[tuple[str, dict[str, float]]], middle: Any) -> Facts:
    ratios: dict[str, list[float]] = {}
    shipped = []
    for method, errors in matrices:
        if errors["nearest"] <= 0:
            continue
        for name, error in errors.items():
            if name != "nearest":
                ratios.setdefault(name, []).append(max(error / errors["nearest"], 1e-12))
        shipped.append(max(errors[method] / errors["nearest"], 1e-12))
    deciles = statistics.quantiles(shipped, n=10) if len(matrices) > 1 and len(shipped) > 1 else None
    return {
        "ratio": {name: middle(values) for name, values in ratios.items()},
        "shipped": middle(shipped) if shipped else None,
        "low": deciles[0] if deciles else None,
        "high": deciles[-1] if deciles else None,
        "won": dict(Counter(method for method, _ in matrices)),
        "judged": len(shipped),
    }


# Experts and draft head -------------------------------------------------------------------------------------


def experts_of(layout: Layout, forward: Records) -> list[Facts]:
    """Calibration tokens of every routed expert, by layer; `even` is what each would see if all were used equally."""
    found = []
    for block in layout.blocks:
        for name, tokens in forward[block.index]["experts"].items():
            even = sum(tokens) / len(tokens)
            found.append(
                {
                    "group": name,
                    "block": block.index,
                    "experts": len(tokens),
                    "even": even,
                    "fewest": min(tokens),
                    "median": statistics.median(tokens),
                    "most": max(tokens),
                    "unseen": sum(count == 0 for count in tokens),
                    "cold": sum(0 < count < COLD * even for count in tokens),
                    "tokens": list(tokens),
                }
            )
    return found


def draft_of(layout: Layout, groups: Facts, formats: Sequence[Facts], backward: Records, weight: float) -> Facts | None:
    """The draft head: how often its best guess is the model's, and its weighted part of every uniform loss."""
    for block in layout.of(BlockKind.DRAFT):
        rows = [row for row, index in enumerate(groups["block"]) if index == block.index]
        facts = backward[block.index]
        return {
            "prefix": block.prefix,
            "groups": len(rows),
            "agreement": dict(facts.get("agreement") or {}),
            "tokens": facts["tokens"],
            "weight": weight,
            "predicted_loss": {
                entry["name"]: total(groups["cost"][entry["name"]][row] for row in rows) for entry in formats
            },
        }
    return None
