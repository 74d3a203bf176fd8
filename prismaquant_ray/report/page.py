"""The report as one HTML page: no file, font or script from anywhere else, readable without JavaScript.

Everything that is shown comes from the report's facts (`jobs.report.gather`); this module only arranges them. Names of
models, modules and files are escaped by the template, and JSON inside the page cannot end its own element.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from prismaquant_ray import formatting
from prismaquant_ray.report.chart import chart
from prismaquant_ray.report.facts import label

Facts = Mapping[str, Any]

#: What to do for figures that are not there.
HOW_TO_MEASURE = "not measured: run sweep --measure"
#: Groups in the table of the most sensitive ones that is open at first.
MOST_SENSITIVE = 12
_KINDS = {
    "decoder": "Decoder",
    "vision": "Vision tower",
    "merger": "Vision tower",
    "draft": "Draft and output head",
    "head": "Draft and output head",
}


def page(report: Facts) -> str:
    """The page."""
    repository = report["repository"]
    written = repository["written"]
    return _template().render(
        report=report,
        chart=chart(report),
        sizes=formatting.shrunk(
            report["model"]["source_bytes"], (written or {}).get("bytes") or repository["at_most_bytes"]
        ),
        made=f"{datetime.fromisoformat(report['made']):%-d %B %Y, %H:%M} UTC",
        reasons=reasons(report),
        sections=sections(report),
        strips=strips(report),
        sensitive=sensitive(report),
        settings=list(_flat(report["settings"])),
        data=_data(report),
        unmeasured=HOW_TO_MEASURE,
        most=MOST_SENSITIVE,
        colours=COLOURS,
    )


#: (light, dark) fill and letter of every format; blues and greens have 4 bits, oranges 8, violet 16.
COLOURS = {
    "INT4": ("#cfe08a", "#1f2a00"),
    "MXFP4": ("#8fd6c0", "#04291f"),
    "NVFP4": ("#9ccbee", "#06263f"),
    "NVFP4A16": ("#5f9fd6", "#00182b"),
    "FP8": ("#f6c65b", "#332200"),
    "MXFP8": ("#e8853d", "#2b1000"),
    "BF16": ("#5b3a94", "#ffffff"),
}


# What the first screen says ---------------------------------------------------------------------------------


def reasons(report: Facts) -> list[str]:
    """Why this budget, in short sentences; only what the figures say."""
    plan = report["plans"][report["budget"]]
    found = [f"The plan for {formatting.target(plan['target'])} takes {plan['bpp']:.4f} bits per parameter."]
    knee = report["knee"]
    if knee is None:
        found.append("The frontier has no knee: fewer than three of its points lie between the targets.")
    else:
        found.append(
            f"The knee of the predicted frontier is at {knee['bpp']:.3f} bits, over {knee['from_bpp']:.3f} to "
            f"{knee['to_bpp']:.3f}. Up to it an added bit buys more than the average of that range, beyond it less. "
            f"The plan lies {_beside(plan['bpp'] - knee['bpp'])}."
        )
    measured_knee = (report["measured"] or {}).get("knee")
    if measured_knee:
        found.append(f"The knee of the measured curve is at {measured_knee['bpp']:.3f} bits.")
    for entry in report["uniform"]:
        loss = entry["predicted_loss"]
        if entry["format"] == "BF16" or not loss or not plan["predicted_loss"]:
            continue
        size = plan["weight_bytes"] / entry["weight_bytes"] - 1
        ours, theirs = _kl(plan), _kl(entry)
        measured = f" (measured: {formatting.change(ours / theirs - 1)})" if ours is not None and theirs else ""
        found.append(
            f"Against {entry['format']} everywhere: {formatting.change(size)} bytes of Linears, "
            f"{formatting.change(plan['predicted_loss'] / loss - 1)} loss{measured}."
        )
    return found


def _beside(bits: float) -> str:
    return "at the knee" if abs(bits) < 0.0005 else f"{abs(bits):.3f} bits {'above' if bits > 0 else 'below'} it"


def _kl(entry: Facts) -> float | None:
    """What was measured with everything rounded that the runtime rounds."""
    found = (entry["measured"] or {}).get("activations")
    return None if found is None else float(found["kl_mean"])


# The map ----------------------------------------------------------------------------------------------------


def sections(report: Facts) -> list[dict[str, Any]]:
    """Layers × modules, a table for each part of the model; cells hold the row of their group, or None."""
    blocks, groups = report["blocks"], report["groups"]
    rows_of: dict[int, dict[str, int]] = {}
    for row, (index, module) in enumerate(zip(groups["block"], groups["module"], strict=True)):
        rows_of.setdefault(index, {})[module] = row
    parts: dict[str, list[Any]] = {}
    for block in blocks:
        if block["index"] in rows_of:
            parts.setdefault(_KINDS[block["kind"]], []).append(block)
    found = []
    for title, columns in parts.items():
        modules = list(dict.fromkeys(module for block in columns for module in rows_of[block["index"]]))
        found.append(
            {
                "title": title,
                "columns": [block["label"] for block in columns],
                "rows": [
                    {"module": module, "cells": [rows_of[block["index"]].get(module) for block in columns]}
                    for module in modules
                ],
            }
        )
    return sorted(found, key=lambda part: part["title"] != "Decoder")


# Tables -----------------------------------------------------------------------------------------------------


def sensitive(report: Facts) -> list[dict[str, Any]]:
    """Every group, the one that loses most in the smallest format it can take first."""
    groups, plan = report["groups"], report["plans"][report["budget"]]
    letters = {entry["letter"]: entry["name"] for entry in report["formats"]}
    names = [entry["name"] for entry in report["formats"]]
    found = []
    for row, name in enumerate(groups["name"]):
        smallest = next(format_ for format_ in names if groups["cost"][format_][row] is not None)
        found.append(
            {
                "name": name,
                "parameters": groups["parameters"][row],
                "format": letters[plan["choice"][row]],
                "smallest": smallest,
                "cost": groups["cost"][smallest][row],
                "costs": {
                    format_: (groups["cost"][format_][row], groups["standard_error"][format_][row])
                    for format_ in names
                    if format_ != "BF16"
                },
            }
        )
    return sorted(found, key=lambda entry: -entry["cost"])


def strips(report: Facts) -> list[dict[str, Any]]:
    """By codec, every kind of Linear with the ratios that ship: the spread of what rounding gained."""
    kinds = {block["index"]: block["kind"] for block in report["blocks"]}
    found: dict[str, dict[str, list[float]]] = {}
    for entry in report["rounding"]["linears"]:
        if entry["shipped"] is not None:
            name = label(kinds[entry["block"]], entry["module"])
            found.setdefault(entry["codec"], {}).setdefault(name, []).append(entry["shipped"])
    return [
        {
            "codec": codec,
            **report["rounding"]["codecs"][codec],
            "rows": [
                {"label": name, "median": statistics.median(ratios), "ratios": ratios}
                for name, ratios in modules.items()
            ],
        }
        for codec, modules in found.items()
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Settings as dotted keys."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield key, ", ".join(_plain(item) for item in value) or "none"
    else:
        yield key, _plain(value)


def _plain(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_plain(inner)}" for name, inner in value.items())
    return str(value)


# What the controls need -------------------------------------------------------------------------------------


def _data(report: Facts) -> dict[str, Any]:
    groups = report["groups"]
    return {
        "formats": [
            {"name": entry["name"], "letter": entry["letter"], "coded": entry["codec"] is not None}
            for entry in report["formats"]
        ],
        "plans": [
            {
                "choice": plan["choice"],
                "text": f"{formatting.target(plan['target'])}: {plan['bpp']:.4f} bits per parameter, "
                f"{formatting.size(plan['weight_bytes'])} of codes and scales, predicted loss "
                f"{formatting.with_error(plan['predicted_loss'], plan['standard_error'])} nats per token; "
                + ", ".join(f"{count} groups {name}" for name, count in plan["groups"].items() if count),
            }
            for plan in report["plans"]
        ],
        "budget": report["budget"],
        "groups": groups["name"],
        "parameters": groups["parameters"],
        "bytes": [groups["bytes"][entry["name"]] for entry in report["formats"]],
        "cost": [_rounded(groups["cost"][entry["name"]]) for entry in report["formats"]],
        "error": [_rounded(groups["standard_error"][entry["name"]]) for entry in report["formats"]],
    }


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Four significant digits are enough to look at."""
    return [None if value is None else float(f"{value:.4g}") for value in values]


def _breakable(name: str) -> Markup:
    """A dotted name that may go on in the next line after a dot or an underscore."""
    return Markup("").join(
        part + Markup("<wbr>") if part in "._" else part for part in re.split(r"([._])", name) if part
    )


@cache
def _template() -> jinja2.Template:
    package = files("prismaquant_ray.report").joinpath("templates")
    names = ("report.html.j2", "report.css", "report.js")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.DictLoader({name: package.joinpath(name).read_text(encoding="utf-8") for name in names}),
    )
    environment.filters |= {
        "figure": formatting.figure,
        "size": formatting.size,
        "amount": formatting.amount,
        "percent": formatting.percent,
        "seconds": formatting.seconds,
        "target": formatting.target,
        "value": formatting.value,
        "error": lambda error: formatting.value(error, error),
        "with_error": formatting.with_error,
        "breakable": _breakable,
    }
    environment.globals["NONE"] = formatting.NONE
    return environment.get_template("report.html.j2")
