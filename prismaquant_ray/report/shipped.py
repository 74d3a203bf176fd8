"""Contents of one repository, for the part of its model card that is not in the findings of its run.

Nothing here depends on the number of workers or where they ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prismaquant_ray.allocation.plans import Choice
from prismaquant_ray.config import Config
from prismaquant_ray.formats import FORMATS
from prismaquant_ray.layout import BlockKind, Layout
from prismaquant_ray.records import CacheType, MeasuredPlans, PlanRecord, TakenText
from prismaquant_ray.report.findings import MeasuredLosses
from prismaquant_ray.report.group_findings import Gain, GroupColumns
from prismaquant_ray.report.groups import group_columns, inside
from prismaquant_ray.report.measurements import measured_choices
from prismaquant_ray.report.rounding_gain import gain_of, roundings
from prismaquant_ray.report.run_data import RunData
from prismaquant_ray.report.source_card import Stated, stated
from prismaquant_ray.repository.manifest import README
from prismaquant_ray.repository.quantization_config import linears_by_format
from prismaquant_ray.repository.writer import Written
from prismaquant_ray.settings.budget import BudgetConfig
from prismaquant_ray.settings.texts import TextSource
from prismaquant_ray.source.resolve import on_hub

_LONGEST_NAME = 120
_PARTS = {
    BlockKind.VISION: "vision blocks",
    BlockKind.MERGER: "vision merger",
    BlockKind.DECODER: "decoder layers",
    BlockKind.DRAFT: "draft head",
    BlockKind.HEAD: "output head",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The model that was quantized. `name` is as the user wrote it; `hub_id` only when it is one on the hub."""

    title: str
    name: str
    hub_id: str | None
    revision: str | None
    stated: Stated


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedFormat:
    """A format in use.

    `width` columns of a matrix share a scale; None for one scale per row. vLLM loads the format from CUDA capability
    `loads_from` (×10, 0 for any) to `loads_to` (None for any) and rounds activations from `full_from`, None if they are
    never rounded. `conditions` are its kernels, and what happens without them.
    """

    name: str
    quantized: bool
    matrices: int
    width: int | None
    loads_from: int
    loads_to: int | None
    full_from: int | None
    conditions: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleRow:
    """Fused groups at the same position in blocks of one kind, counted by format."""

    kind: str
    name: str
    counts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ignored:
    """Modules left unquantized for one reason, counted by name with `*` for numbers."""

    reason: str
    names: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedRounding:
    """Gain of rounding over the matrices shipped in a format, as geometric means."""

    format: str
    matrices: int
    gain: Gain


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationProvenance:
    """The calibration data; `tokens` includes image tokens, `fingerprint` is that of the tokens."""

    text: str
    text_sha256: str
    fingerprint: str
    tokens: int
    images: int
    sources: tuple[TakenText, ...]
    seed: int
    labels: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """Card data of one repository beyond the findings.

    `equalized` counts the inputs whose channels are scaled in what ships, `ruled` says whether settings other than the
    budget limited the choice. `prices` are under `token_fisher`, in nats per token, for any objective. `config` is
    YAML. Sizes are bytes, `bpp` is bits per quantizable parameter. `measured` has measured losses by choice (one letter
    per group) and type of KV cache, for any target.
    """

    source: Source
    budget: str
    ruled: bool
    bpp: float
    bits_all_parameters: float
    weight_bytes: int
    prices: GroupColumns
    measured: Mapping[tuple[str, CacheType], MeasuredLosses]
    formats: tuple[ShippedFormat, ...]
    modules: tuple[ModuleRow, ...]
    ignored: tuple[Ignored, ...]
    rounding: tuple[ShippedRounding, ...]
    equalized: int
    calibration: CalibrationProvenance
    config: str
    dtype: str
    device: str | None


def gather_shipped(data: RunData, plan: PlanRecord, written: Written, measured: MeasuredPlans | None) -> Shipped:
    """Card data of the repository of `plan`, as written."""
    config, allocation = data.config, data.config.allocation
    return Shipped(
        source=_source(data),
        budget=_budget(config.budget),
        ruled=bool(allocation.force or allocation.floor or allocation.limits.given),
        bpp=written.bpp,
        bits_all_parameters=written.bits_all_parameters,
        weight_bytes=written.weight_bytes,
        prices=group_columns(data, "token_fisher"),
        measured=measured_choices(measured, data.layout),
        formats=tuple(_formats(data.layout, plan.choice)),
        modules=_modules(data.layout, plan.choice),
        ignored=_ignored(data.layout),
        rounding=tuple(_rounding(data, plan.choice)),
        equalized=sum(
            fold.is_used(block, plan.choice) for block in data.layout.blocks for fold in data.forward[block.index].folds
        ),
        calibration=_calibration(data),
        config=_config(config),
        dtype=config.model.dtype,
        device=data.device,
    )


def named(location: Path | str) -> str:
    """A location as the user wrote it; the file name alone for a long path or one outside the working directory."""
    path = Path(location)
    if "://" in str(location):
        return str(location)
    return path.name if path.is_absolute() or ".." in path.parts or len(str(path)) > _LONGEST_NAME else str(path)


def _source(data: RunData) -> Source:
    model, source = data.config.model, data.source
    hub_id = model.source if on_hub(model.source) else None
    readme = source.store.get(README).decode("utf-8", "replace") if README in source.other_files() else None
    return Source(
        title=model.source.rstrip("/").rpartition("/")[2],
        name=named(model.source),
        hub_id=hub_id,
        revision=None if hub_id is None else model.revision,
        stated=stated(readme),
    )


def _budget(budget: BudgetConfig) -> str:
    if budget.bpp is not None:
        return f"{budget.bpp:g} bits per quantizable parameter"
    if budget.bytes is not None:
        return f"{budget.bytes:,} bytes for the whole repository"
    return f"{budget.vram:,} bytes of GPU memory, with {budget.sequences} sequences of {budget.context} tokens"


def _formats(layout: Layout, choice: Choice) -> Iterator[ShippedFormat]:
    for name, linears in linears_by_format(layout, choice).items():
        if not linears:
            continue
        format_ = FORMATS[name]
        codec = format_.codec
        widths = {codec.width(linear.in_features) for linear in linears} if codec else set()
        yield ShippedFormat(
            name=str(name),
            quantized=codec is not None,
            matrices=sum(len(linear.names) for linear in linears),
            # With one scale per row, a row may be split anywhere.
            width=max(widths) if codec and not widths & {linear.in_features for linear in linears} else None,
            loads_from=format_.served.loads_from,
            loads_to=format_.served.loads_to,
            full_from=format_.served.full_from if format_.round_activation else None,
            conditions=format_.served.conditions,
        )


def _modules(layout: Layout, choice: Choice) -> tuple[ModuleRow, ...]:
    counts: dict[tuple[BlockKind, str], Counter[str]] = {}
    for block in layout.blocks:
        for group in block.groups:
            place = (block.kind, _numberless(inside(group.name, block)))
            counts.setdefault(place, Counter())[str(choice[group.name])] += 1
    return tuple(ModuleRow(kind=_PARTS[kind], name=name, counts=found) for (kind, name), found in counts.items())


def _ignored(layout: Layout) -> tuple[Ignored, ...]:
    reasons: dict[str, Counter[str]] = {}
    for name, reason in layout.ignored.items():
        reasons.setdefault(reason, Counter())[_numberless(name)] += 1
    return tuple(Ignored(reason=reason, names=names) for reason, names in reasons.items())


def _numberless(name: str) -> str:
    """`model.layers.*.mlp.gate`: one name for the same module of every block."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _rounding(data: RunData, choice: Choice) -> Iterator[ShippedRounding]:
    for name, linears in linears_by_format(data.layout, choice).items():
        if FORMATS[name].codec is None or not linears:
            continue
        gain = gain_of(roundings(data, name, [linear.name for linear in linears]))
        yield ShippedRounding(format=str(name), matrices=sum(gain.won.values()), gain=gain)


def _calibration(data: RunData) -> CalibrationProvenance:
    calibration = data.config.calibration
    return CalibrationProvenance(
        text=", ".join(_placed(text) for text in calibration.text),
        text_sha256=str(data.fingerprint["calibration.text"]),
        fingerprint=data.calibration.fingerprint,
        tokens=data.calibration.positions,
        images=len(data.calibration.images),
        sources=data.calibration.sources,
        seed=calibration.seed,
        labels=calibration.labels,
    )


def _placed(text: TextSource) -> str:
    return named(text.path) if text.is_file else text.name


def _texts(texts: tuple[TextSource, ...]) -> Any:
    """Sources as YAML has them, a single one in short; files by name."""
    placed = [text.model_copy(update={"path": named(text.path)}) if text.is_file else text for text in texts]
    found: list[Any] = [text.model_dump() for text in placed]
    return found[0] if found == [placed[0].path] else found


def _config(config: Config) -> str:
    """YAML of the settings that decide the result and are not defaults; locations by name, of the cluster `threads`."""
    body = config.model_dump(mode="json", exclude_defaults=True, exclude={"sweep", "cluster", "store"})
    body["model"]["source"] = named(config.model.source)
    body["formats"] = [str(name) for name in config.formats]
    for name, section in (("calibration", config.calibration), ("evaluation", config.evaluation)):
        if section is not None and "text" in body.get(name, {}):
            body[name]["text"] = _texts(section.text)
        if section is not None and section.images is not None:
            body[name]["images"] = named(section.images)
    if config.cluster.threads != 1:
        body["cluster"] = {"threads": config.cluster.threads}
    body["store"] = {"run": "run", "output": "repository"}
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
