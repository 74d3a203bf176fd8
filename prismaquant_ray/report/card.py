"""The model card: README.md of a repository.

Front matter goes through a YAML writer and every value in the text through `markdown.escaped`, because names of models,
files and modules are untrusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import yaml

from prismaquant_ray.formats.base import VLLM
from prismaquant_ray.formatting import plan_times
from prismaquant_ray.records import Divergence
from prismaquant_ray.report.card_view import CardView
from prismaquant_ray.report.findings import Findings
from prismaquant_ray.report.markdown import Markdown, code, escaped, fenced, line, table
from prismaquant_ray.report.shipped import Shipped, named

# Limits on table rows, and on names per reason; the whole plan is in prismaquant.json.
_ROWS = 24
_NAMES = 6
_METHODS = {"search": "scales searched", "gptq": "GPTQ"}


def card(findings: Findings, shipped: Shipped) -> str:
    """README.md: metadata as the hub reads it, then the text. At most `budget.CARD_BYTES` as UTF-8."""
    view = CardView(findings=findings, shipped=shipped)
    return f"---\n{_front_matter(view)}---\n\n{_template().render(card=view, tables=_Tables(view))}"


def _front_matter(view: CardView) -> str:
    said = view.shipped.source.stated
    task = "text-generation" if view.findings.model.architecture.endswith("ForCausalLM") else None
    if view.vision_blocks:
        task = "image-text-to-text"
    entries: dict[str, Any] = {
        "license": _one_or_all(said.license),
        "license_name": said.license_name if said.license else None,
        "license_link": said.license_link if said.license else None,
        "language": list(said.language),
        "base_model": _one_or_all(view.base_models),
        "base_model_relation": "quantized" if view.base_models and view.quantized else None,
        "library_name": "vllm",
        "pipeline_tag": said.pipeline_tag or task,
        "tags": [*_tags(view), "prismaquant-ray"],
    }
    present = {
        key: line(value) if isinstance(value, str) else [line(entry) for entry in value]
        for key, value in entries.items()
        if value
    }
    return yaml.safe_dump(present, sort_keys=False, allow_unicode=True, width=10**6)


def _tags(view: CardView) -> list[str]:
    names = [entry.name.lower() for entry in view.quantized]
    mixed = ["mixed-precision"] if len(view.shipped.formats) > 1 else []
    return ["compressed-tensors", "quantized", *mixed, *names] if names else []


def _one_or_all(values: tuple[str, ...]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else list(values) or None


class _Tables:
    """The tables of a card."""

    def __init__(self, view: CardView) -> None:
        self.view, self.findings, self.shipped = view, view.findings, view.shipped

    def glance(self) -> Markdown:
        """Size, bits, formats and losses."""
        return table(["", ""], self._glance(), words=2)

    def _glance(self) -> Iterator[tuple[str, Any]]:
        shipped, predicted = self.shipped, self.view.predicted
        yield (
            "Size",
            f"{_size(shipped.weight_bytes)} of weights; the source has {_size(self.findings.model.source_bytes)}",
        )
        yield (
            "Bits",
            f"{shipped.bpp:.4f} per quantizable parameter, {shipped.bits_all_parameters:.3f} per parameter of the "
            f"whole model (budget: {shipped.budget})",
        )
        yield "Formats", ", ".join(f"{share.groups} groups {share.format}" for _, share, _ in self.view.formats)
        plan = self.view.plan
        assert predicted.cost is not None
        assert predicted.standard_error is not None
        cost, error = predicted.cost + plan.kv_cache_loss, math.hypot(predicted.standard_error, plan.kv_cache_error)
        yield "Predicted loss", f"{cost:.5f} ± {error:.5f} nats per token above the source's"
        yield (
            "",
            f"rounded weights alone {predicted.weight_cost:.5f}, activations {predicted.activation_cost:.5f}; the rest "
            "is of both together",
        )
        if plan.kv_cache == "fp8":
            yield (
                "KV cache",
                f"FP8, with a scale for the keys and one for the values of each layer; {plan.kv_cache_loss:.5f} of the "
                "predicted loss",
            )
        yield "Speed", f"{plan_times(self.view.plan.times)}; computed from its data sheet, for the Linears alone"
        measured = self.view.measured
        if measured is None:
            yield "Measured loss", "not measured"
            return
        for divergence, what in ((measured.weights, "weights"), (measured.activations, "weights and activations")):
            if divergence is not None:
                yield f"Measured KL, {what} rounded", f"{_loss(divergence)} nats per token from the source"

    def mix(self) -> Markdown:
        """Contents of each format."""
        everything = self.findings.composition.all.parameters
        rows = [
            (
                entry.name,
                summary,
                share.groups,
                f"{entry.matrices:,}",
                f"{share.parameters:,}",
                f"{100 * share.parameters / everything:.1f} %",
                f"{share.bits:.3f}",
            )
            for entry, share, summary in self.view.formats
        ]
        titles = ["format", "what it is", "groups", "matrices", "parameters", "share", "bits per parameter"]
        return table(titles, rows, words=2)

    def modules(self) -> Markdown:
        """Kinds of groups, counted by format."""
        formats = [entry.name for entry in self.shipped.formats]
        rows = [
            (row.kind, code(row.name), *(row.counts.get(name) or "" for name in formats))
            for row in self.shipped.modules[:_ROWS]
        ]
        return table(["in", "group", *formats], rows, words=2)

    def ignored(self) -> Markdown:
        """Modules that were not candidates, by reason."""
        rows = [(_names(entry.names), entry.reason) for entry in self.shipped.ignored[:_ROWS]]
        return table(["modules", "why"], rows, words=2)

    def rounding(self) -> Markdown:
        """Gain of each rounding method; 1 where round-to-nearest has no error."""
        found = self.shipped.rounding
        methods = list(dict.fromkeys(name for entry in found for name in sorted(entry.gain.ratio, reverse=True)))
        rows = [
            (
                entry.format,
                f"{entry.matrices:,}",
                *(f"{entry.gain.ratio[name]:.3f}" if name in entry.gain.ratio else "" for name in methods),
                f"{1.0 if entry.gain.shipped is None else entry.gain.shipped:.3f}",
                ", ".join(
                    f"{_METHODS.get(name, name)} {count:,}"
                    for name, count in sorted(entry.gain.won.items(), key=lambda won: -won[1])
                ),
            )
            for entry in found
        ]
        return table(
            ["format", "matrices", *(_METHODS[name] for name in methods), "as shipped", "best way"], rows, words=1
        )

    def sweep(self) -> Markdown:
        """Plans of other budgets; this one is marked."""
        plans = self.view.sweep
        formats = list(dict.fromkeys(name for plan in plans for name in plan.groups))
        found = [self.view.measured_of(plan) for plan in plans]
        measured = {
            "measured KL, weights": [entry and _kl(entry.weights) for entry in found],
            "activations too": [entry and _kl(entry.activations) for entry in found],
        }
        shown = {title: values for title, values in measured.items() if any(value is not None for value in values)}
        rows = []
        for place, plan in enumerate(plans):
            cells = [
                f"{plan.bpp:.4f}",
                *(plan.groups.get(name, 0) for name in formats),
                f"{plan.repository_bytes_at_most / 1e6:,.1f}",
                f"{plan.times.prefill:.2f}",
                f"{plan.times.decode:.2f}",
                f"{self.view.predicted_loss(plan):.5f}",
                *("" if values[place] is None else f"{values[place]:.4f}" for values in shown.values()),
            ]
            row = [plan.target, *cells]
            rows.append([Markdown(f"**{escaped(cell)}**") for cell in row] if plan is self.view.plan else row)
        return table(
            ["budget", "bits", *formats, "repository, MB at most", "prefill", "decode", "predicted", *shown],
            rows,
            words=1,
        )

    def measured(self) -> Markdown:
        """Measured losses of this plan."""
        found, known = self.view.measured, self.findings.measured
        assert found is not None
        assert known is not None
        columns = {"weights rounded": found.weights, "activations too": found.activations}
        there = {title: divergence for title, divergence in columns.items() if divergence is not None}
        source = {
            "perplexity": known.source.perplexity,
            "draft head agrees with the model": known.source.draft_agreement,
        }
        rows: list[tuple[Any, ...]] = [("KL from the source, nats per token", "0", *map(_loss, there.values()))]
        figures: dict[str, list[float | None]] = {
            "its 99th percentile": [entry.kl_p99 for entry in there.values()],
            "most likely token is the source's": [entry.top1_agreement for entry in there.values()],
            "perplexity": [entry.perplexity for entry in there.values()],
            "draft head agrees with the model": [entry.draft_agreement for entry in there.values()],
            "tokens that meet other experts than in the source": [entry.rerouted for entry in there.values()],
        }
        for title, values in figures.items():
            if any(value is not None for value in values):
                rows.append((title, *("" if each is None else f"{each:.4g}" for each in (source.get(title), *values))))
        return table(["", "source", *there], rows, words=1)

    def versions(self) -> Markdown:
        """Versions that made the repository."""
        return Markdown(", ".join(f"{escaped(name)} {escaped(number)}" for name, number in self.view.versions))


def _names(names: Mapping[str, int]) -> Markdown:
    """The first few module names with their counts."""
    shown = [f"{code(name)}{f' ×{count}' if count > 1 else ''}" for name, count in list(names.items())[:_NAMES]]
    more = len(names) - _NAMES
    return Markdown(", ".join(shown) + (f" and {more} other names" if more > 0 else ""))


def _kl(divergence: Divergence | None) -> float | None:
    return None if divergence is None else divergence.kl_mean


def _loss(divergence: Divergence) -> str:
    return f"{divergence.kl_mean:.4f} ± {divergence.kl_standard_error:.4f}"


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 10**10 else f"{size / 1e6:,.1f} MB"


def _listed(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # noqa: S701 - Markdown, not HTML: `escaped` stands in for autoescape
        finalize=escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "fenced": fenced, "listed": _listed, "named": named}
    environment.globals["vllm"] = VLLM
    source = files("prismaquant_ray.report").joinpath("templates/card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
