"""The report as one self-contained HTML page, readable without JavaScript.

The template escapes names of models, modules and files; embedded JSON cannot close its own element.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from prismaquant_ray import formatting
from prismaquant_ray.formats import FORMATS
from prismaquant_ray.report.arrangement import least_gained, sections, sensitive, strips
from prismaquant_ray.report.chart import chart
from prismaquant_ray.report.findings import Findings, PlanFindings, UniformFindings
from prismaquant_ray.report.surface_chart import surface_chart

#: Hint for missing measured figures.
HOW_TO_MEASURE = "not measured: run sweep --measure"
#: Rows shown at first in the table of the most sensitive groups.
MOST_SENSITIVE = 12
#: Rows of the longest tables; the page says what it leaves out. With all of them 2,000 blocks would take 15 MB.
LONGEST = 1000


def page(findings: Findings) -> str:
    """The page."""
    repository = findings.repository
    size = repository.written.bytes if repository.written else repository.at_most_bytes
    return _template().render(
        report=findings,
        chart=chart(findings),
        surface=surface_chart(findings),
        sizes=formatting.shrunk(findings.model.source_bytes, size),
        made=f"{datetime.fromisoformat(findings.made):%-d %B %Y, %H:%M} UTC",
        reasons=reasons(findings),
        sections=sections(findings),
        strips=strips(findings),
        sensitive=sensitive(findings),
        settings=list(_flat(findings.settings)),
        data=_data(findings),
        unmeasured=HOW_TO_MEASURE,
        most=MOST_SENSITIVE,
        longest=LONGEST,
        linears=least_gained(findings, LONGEST),
        workers=[(entry, worker) for entry in findings.timings.passes for worker in entry.workers],
        colours={str(name): format_.colours for name, format_ in FORMATS.items()},
    )


# First screen ---------------------------------------------------------------------------------


def reasons(findings: Findings) -> list[str]:
    """Why this budget, in short sentences derived from the figures."""
    plan, knee = findings.plan, findings.knee
    found = [f"The plan for {formatting.target(plan.target)} takes {plan.bpp:.4f} bits per parameter."]
    if knee is None:
        found.append("The frontier has no knee: fewer than three of its points lie between the targets.")
    else:
        found.append(
            f"The knee of the predicted frontier is at {knee.bpp:.3f} bits, over {knee.from_bpp:.3f} to "
            f"{knee.to_bpp:.3f}. Up to it an added bit buys more than the average of that range, beyond it less. "
            f"The plan lies {_beside(plan.bpp - knee.bpp)}."
        )
    if findings.measured is not None and findings.measured.knee is not None:
        found.append(f"The knee of the measured curve is at {findings.measured.knee.bpp:.3f} bits.")
    for entry in findings.uniform:
        loss, size = entry.predicted_loss, entry.weight_bytes
        if entry.format == "BF16" or not loss or not size or not plan.predicted_loss:
            continue
        ours, theirs = _kl(plan), _kl(entry)
        measured = f" (measured: {formatting.change(ours / theirs - 1)})" if ours is not None and theirs else ""
        found.append(
            f"Against {entry.format} everywhere: {formatting.change(plan.weight_bytes / size - 1)} bytes of Linears, "
            f"{formatting.change(plan.predicted_loss / loss - 1)} loss{measured}."
        )
    return found


def _beside(bits: float) -> str:
    return "at the knee" if abs(bits) < 0.0005 else f"{abs(bits):.3f} bits {'above' if bits > 0 else 'below'} it"


def _kl(entry: PlanFindings | UniformFindings) -> float | None:
    """Measured KL with weights and activations rounded."""
    if entry.measured is None or entry.measured.activations is None:
        return None
    return entry.measured.activations.kl_mean


# Settings ---------------------------------------------------------------------------------------------------


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


# Data of the interactive controls -------------------------------------------------------------------------------------


def _data(findings: Findings) -> dict[str, Any]:
    groups, names = findings.groups, [entry.name for entry in findings.formats]
    return {
        "formats": [
            {"name": entry.name, "letter": entry.letter, "coded": entry.codec is not None} for entry in findings.formats
        ],
        "plans": [
            {
                "choice": plan.choice,
                "text": f"{formatting.target(plan.target)}: {plan.bpp:.4f} bits per parameter, "
                f"{formatting.size(plan.weight_bytes)} of codes and scales, predicted loss "
                f"{formatting.with_error(plan.predicted_loss, plan.standard_error)} nats per token; "
                + ", ".join(f"{count} groups {name}" for name, count in plan.groups.items() if count),
            }
            for plan in findings.plans
        ],
        "budget": findings.budget,
        "groups": groups.name,
        "parameters": groups.parameters,
        "bytes": [groups.bytes[name] for name in names],
        "cost": [_rounded(groups.cost[name]) for name in names],
        "error": [_rounded(groups.standard_error[name]) for name in names],
    }


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Values to four significant digits."""
    return [None if value is None else float(f"{value:.4g}") for value in values]


def _breakable(name: str) -> Markup:
    """A dotted name with line-break opportunities after dots and underscores."""
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
        "times_basis": formatting.times_basis,
        "breakable": _breakable,
    }
    environment.globals["NONE"] = formatting.NONE
    return environment.get_template("report.html.j2")
