"""The model card: README.md of a repository, from plain facts.

Front matter goes through a YAML writer and every value of the text through `markdown.escaped`: names of models, files
and modules come from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import yaml

from prismaquant_ray.report.card_facts import CardFacts, Divergence
from prismaquant_ray.report.markdown import Markdown, code, escaped, fenced, line, table

# Rows of a table, and names after one reason: a card is read, the whole plan is in prismaquant.json.
_ROWS = 24
_NAMES = 6


def card(facts: CardFacts) -> str:
    """README.md: metadata as the hub reads it, then the text. At most `budget.CARD_BYTES` as UTF-8."""
    return f"---\n{_front_matter(facts)}---\n\n{_template().render(facts=facts, tables=_Tables(facts))}"


def _front_matter(facts: CardFacts) -> str:
    said = facts.source.stated
    task = "text-generation" if facts.source.architecture.endswith("ForCausalLM") else None
    if facts.vision_blocks:
        task = "image-text-to-text"
    entries: dict[str, Any] = {
        "license": _one_or_all(said.license),
        "license_name": said.license_name if said.license else None,
        "license_link": said.license_link if said.license else None,
        "language": list(said.language),
        "base_model": _one_or_all(facts.base_models),
        "base_model_relation": "quantized" if facts.base_models and facts.quantized else None,
        "library_name": "vllm",
        "pipeline_tag": said.pipeline_tag or task,
        "tags": [*_tags(facts), "prismaquant-ray"],
    }
    present = {key: _on_lines(value) for key, value in entries.items() if value}
    return yaml.safe_dump(present, sort_keys=False, allow_unicode=True, width=10**6)


def _on_lines(value: str | list[str]) -> str | list[str]:
    return line(value) if isinstance(value, str) else [line(entry) for entry in value]


def _tags(facts: CardFacts) -> list[str]:
    names = [share.name.lower() for share in facts.quantized]
    mixed = ["mixed-precision"] if len(facts.formats) > 1 else []
    return ["compressed-tensors", "quantized", *mixed, *names] if names else []


def _one_or_all(values: tuple[str, ...]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else list(values) or None


class _Tables:
    """The tables of a card."""

    def __init__(self, facts: CardFacts) -> None:
        self.facts = facts
        self.formats = [share.name for share in facts.formats]

    def glance(self) -> Markdown:
        """What one wants to know first."""
        return table(["", ""], self._glance(), words=2)

    def _glance(self) -> Iterator[tuple[str, Any]]:
        facts = self.facts
        yield "Size", f"{_size(facts.weight_bytes)} of weights; the source has {_size(facts.source.weight_bytes)}"
        yield (
            "Bits",
            f"{facts.bpp:.4f} per quantizable parameter, {facts.bits_all_parameters:.3f} per parameter of the whole "
            f"model (budget: {facts.budget})",
        )
        yield "Formats", ", ".join(f"{share.groups} groups {share.name}" for share in facts.formats)
        yield "Predicted loss", f"{facts.predicted:.5f} ± {facts.standard_error:.5f} nats per token above the source's"
        if facts.predicted_weights is not None and facts.predicted_activations is not None:
            parts = (
                f"rounded weights alone {facts.predicted_weights:.5f}, activations {facts.predicted_activations:.5f}"
            )
            yield "", f"{parts}; the rest is of both together"
        measured = facts.measured
        if measured is None:
            yield "Measured loss", "not measured"
            return
        for divergence, what in ((measured.weights, "weights"), (measured.activations, "weights and activations")):
            if divergence is not None:
                yield f"Measured KL, {what} rounded", f"{_loss(divergence)} nats per token from the source"

    def mix(self) -> Markdown:
        """What each format holds."""
        everything = sum(share.parameters for share in self.facts.formats)
        rows = [
            (
                share.name,
                share.summary,
                share.groups,
                f"{share.matrices:,}",
                f"{share.parameters:,}",
                f"{100 * share.parameters / everything:.1f} %",
                f"{8 * share.weight_bytes / share.parameters:.3f}",
            )
            for share in self.facts.formats
        ]
        titles = ["format", "what it is", "groups", "matrices", "parameters", "share", "bits per parameter"]
        return table(titles, rows, words=2)

    def modules(self) -> Markdown:
        """Which kinds of groups have which format."""
        rows = [
            (row.kind, code(row.name), *(row.counts.get(name) or "" for name in self.formats))
            for row in self.facts.modules[:_ROWS]
        ]
        return table(["in", "group", *self.formats], rows, words=2)

    def kept(self) -> Markdown:
        """What was no candidate, and why."""
        rows = [(_names(entry.names), entry.reason) for entry in self.facts.kept[:_ROWS]]
        return table(["modules", "why"], rows, words=2)

    def rounding(self) -> Markdown:
        """What each way of rounding gained."""
        methods = list(dict.fromkeys(name for entry in self.facts.rounding for name in entry.ratios))
        titles = {"search": "scales searched", "gptq": "GPTQ"}
        rows = [
            (
                entry.format,
                f"{entry.matrices:,}",
                *(f"{entry.ratios[name]:.3f}" if name in entry.ratios else "" for name in methods),
                f"{entry.shipped:.3f}",
                ", ".join(f"{titles.get(name, name)} {count:,}" for name, count in entry.won.items()),
            )
            for entry in self.facts.rounding
        ]
        return table(
            ["format", "matrices", *(titles.get(name, name) for name in methods), "as shipped", "best way"],
            rows,
            words=1,
        )

    def sweep(self) -> Markdown:
        """What other budgets would have given; this one is marked."""
        facts = self.facts
        formats = list(dict.fromkeys(name for row in facts.sweep for name in row.counts))
        measured = {
            "measured KL, weights": [row.measured_weights for row in facts.sweep],
            "activations too": [row.measured_activations for row in facts.sweep],
        }
        shown = {title: values for title, values in measured.items() if any(value is not None for value in values)}
        rows = []
        for place, row in enumerate(facts.sweep):
            cells = [
                f"{row.bpp:.4f}",
                *(row.counts.get(name, 0) for name in formats),
                f"{row.bytes_at_most / 1e6:,.1f}",
                f"{row.predicted:.5f}",
                *("" if values[place] is None else f"{values[place]:.4f}" for values in shown.values()),
            ]
            rows.append([_bold(cell) for cell in (row.target, *cells)] if row.chosen else [row.target, *cells])
        return table(["budget", "bits", *formats, "repository, MB at most", "predicted", *shown], rows, words=1)

    def measured(self) -> Markdown:
        """What was measured of this plan."""
        found = self.facts.measured
        assert found is not None
        columns = {"weights rounded": found.weights, "activations too": found.activations}
        there = {title: divergence for title, divergence in columns.items() if divergence is not None}
        source = {
            "perplexity": found.source_perplexity,
            "draft head agrees with the model": found.source_draft_agreement,
        }
        rows: list[tuple[Any, ...]] = [("KL from the source, nats per token", "0", *map(_loss, there.values()))]
        for title, values in {
            "its 99th percentile": [entry.kl_p99 for entry in there.values()],
            "most likely token is the source's": [entry.top1_agreement for entry in there.values()],
            "perplexity": [entry.perplexity for entry in there.values()],
            "draft head agrees with the model": [entry.draft_agreement for entry in there.values()],
        }.items():
            if any(value is not None for value in values):
                rows.append((title, *(_figure(value) for value in (source.get(title), *values))))
        return table(["", "source", *there], rows, words=1)

    def versions(self) -> Markdown:
        """What the repository was made with."""
        return Markdown(", ".join(f"{escaped(name)} {escaped(number)}" for name, number in self.facts.versions.items()))


def _names(names: Mapping[str, int]) -> Markdown:
    """Modules with how many there are, the first few by name."""
    shown = [f"{code(name)}{f' ×{count}' if count > 1 else ''}" for name, count in list(names.items())[:_NAMES]]
    more = len(names) - _NAMES
    return Markdown(", ".join(shown) + (f" and {more} other names" if more > 0 else ""))


def _bold(cell: Any) -> Markdown:
    return Markdown(f"**{escaped(cell)}**")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _loss(divergence: Divergence) -> str:
    error = divergence.kl_standard_error
    return f"{divergence.kl_mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


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
    environment.filters |= {"code": code, "fenced": fenced, "listed": _listed}
    source = files("prismaquant_ray.report").joinpath("templates/card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
