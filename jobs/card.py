"""The model card of a plan, its facts gathered from the run."""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from actors.schedule.units import Stage
from benchmarks.bundled_model import EMBEDDED_MODELS
from jobs.card_plans import knee, measured, named, predicted_loss, sweep_rows
from jobs.run import Run
from prismaquant_ray import __version__
from prismaquant_ray.calibration.stored import read_calibration
from prismaquant_ray.config import AllocationConfig, BudgetConfig, Config
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.servability import NOT_IN_TRANSFORMERS, SERVABILITY, VLLM
from prismaquant_ray.forward.encode import by_matrix
from prismaquant_ray.layout import BlockKind, Layout
from prismaquant_ray.report.card import card
from prismaquant_ray.report.card_facts import (
    Calibration,
    CardFacts,
    Experts,
    FormatShare,
    Kept,
    ModuleRow,
    Rounding,
    Source,
    stated,
)
from prismaquant_ray.repository.quantization_config import Choice, linears_by_format
from prismaquant_ray.repository.writer import README, Written

_PACKAGES = ("torch", "transformers", "compressed-tensors", "ray")
_PARTS = {
    BlockKind.VISION: "vision blocks",
    BlockKind.MERGER: "vision merger",
    BlockKind.DECODER: "decoder layers",
    BlockKind.DRAFT: "draft head",
    BlockKind.HEAD: "output head",
}


def card_of(run: Run, plan: Mapping[str, Any], written: Written) -> bytes:
    """README.md of the repository that is being written for a plan."""
    return card(facts_of(run, plan, written)).encode()


def facts_of(run: Run, plan: Mapping[str, Any], written: Written) -> CardFacts:
    """What a plan's card says. Nothing in it depends on how many workers measured, or on where they ran.

    StoreError when a sweep or a measurement is stored that cannot be read.
    """
    layout, config = run.layout, run.config
    choice = {group: FormatName(name) for group, name in plan["choice"].items()}
    rows, more = sweep_rows(run, plan)
    weights, activations = _parts_of_loss(run, choice)
    draft, head = layout.of(BlockKind.DRAFT), layout.of(BlockKind.HEAD)
    of_experts = {choice[group.name] for group in layout.groups if group.experts is not None}
    return CardFacts(
        version=__version__,
        source=_source(run),
        budget=_budget(config.budget),
        objective=plan["objective"],
        ruled=_is_ruled(config.allocation),
        bpp=written.bpp,
        bits_all_parameters=written.bits_all_parameters,
        weight_bytes=written.weight_bytes,
        predicted=predicted_loss(run, plan["choice"]),
        standard_error=plan["standard_error"],
        predicted_weights=weights,
        predicted_activations=activations,
        gap=plan["gap"] if plan["objective"] == "token_fisher" else 0.0,
        formats=tuple(_shares(run, choice)),
        modules=_modules(layout, choice),
        kept=_kept(layout),
        rounding=tuple(_rounding(run, choice)),
        sweep=rows,
        more_targets=more,
        swept=len(rows) > 1,
        knee=knee(run),
        measured=measured(run, plan),
        experts=_experts(run),
        vision_blocks=len(layout.of(BlockKind.VISION)),
        agreement=run.records[Stage.BACKWARD][draft[0].index].metrics["agreement"] if draft else None,
        draft_weight=config.allocation.mtp_weight,
        head=any(choice[group.name] is not FormatName.BF16 for block in head for group in block.groups),
        expert_formats=tuple(str(name) for name in NOT_IN_TRANSFORMERS if name in of_experts),
        vllm=VLLM,
        calibration=_calibration(run),
        config=_config(config),
        dtype=config.model.dtype,
        device=(run.stored("device.json", made_by="quantize --fresh") or {}).get("device"),
        versions={**{name: version(name) for name in _PACKAGES}, "Python": platform.python_version()},
    )


# The source ---------------------------------------------------------------------------------------------------------


def _source(run: Run) -> Source:
    model, source = run.config.model, run.source
    embedded = EMBEDDED_MODELS[model.embedded] if model.embedded is not None else None
    on_hub = embedded is None and "://" not in model.source and not Path(model.source).is_dir()
    readme = source.store.get(README).decode("utf-8", "replace") if README in source.other_files() else None
    return Source(
        title=embedded.title if embedded else model.source.rstrip("/").rpartition("/")[2],
        name=named(model.source),
        hub_id=model.source if on_hub else None,
        revision=model.revision if on_hub else None,
        origin=embedded.origin.replace("`", "") if embedded else None,
        architecture=run.layout.architecture,
        guesses=run.layout.guesses,
        weight_bytes=sum(info.nbytes for info in source.stored.values()),
        stated=stated(readme),
    )


def _budget(budget: BudgetConfig) -> str:
    if budget.bpp is not None:
        return f"{budget.bpp:g} bits per quantizable parameter"
    if budget.bytes is not None:
        return f"{budget.bytes:,} bytes for the whole repository"
    return f"{budget.vram:,} bytes of GPU memory, with {budget.sequences} sequences of {budget.context} tokens"


def _is_ruled(allocation: AllocationConfig) -> bool:
    """Whether more than the budget limits the choice."""
    return bool(allocation.force or allocation.floor or allocation.max_bf16_fraction is not None)


def _calibration(run: Run) -> Calibration:
    found = read_calibration(run.store)
    fingerprint = json.loads(run.store.get("run.json"))["fingerprint"]
    return Calibration(
        text=named(run.config.calibration.text),
        text_sha256=fingerprint["calibration.text"],
        fingerprint=found.fingerprint,
        tokens=found.positions,
        images=len(found.images),
        seed=run.config.calibration.seed,
        labels=run.config.calibration.labels,
    )


def _config(config: Config) -> str:
    """YAML of what decides the result and is not a default; of places only names, of the cluster only `threads`."""
    body = config.model_dump(mode="json", exclude_defaults=True, exclude={"sweep", "cluster", "store"})
    body["model"]["source"] = named(config.model.source)
    body["formats"] = [str(name) for name in config.formats]
    for section in (config.calibration, config.evaluation):
        for key in ("text", "images"):
            location = getattr(section, key, None)
            if location is not None:
                body["calibration" if section is config.calibration else "evaluation"][key] = named(location)
    if config.cluster.threads != 1:
        body["cluster"] = {"threads": config.cluster.threads}
    body["store"] = {"run": "run", "output": "repository"}
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


# The plan -----------------------------------------------------------------------------------------------------------


def _parts_of_loss(run: Run, choice: Choice) -> tuple[float | None, float | None]:
    """Predicted losses of rounded weights and of rounded activations by themselves; None for older records."""
    weights, activations = 0.0, 0.0
    for group, name in choice.items():
        if FORMATS[name].codec is None:
            continue
        block = run.layout.block_of[group]
        price = run.records[Stage.BACKWARD][block.index].metrics["groups"][group][name]
        if "weight_cost" not in price:
            return None, None
        share = run.config.allocation.mtp_weight if block.kind is BlockKind.DRAFT else 1.0
        weights += share * price["weight_cost"]
        activations += share * price["activation_cost"]
    return weights, activations


def _shares(run: Run, choice: Choice) -> Iterator[FormatShare]:
    sizes = run.sizes
    for name, linears in linears_by_format(run.layout, choice).items():
        if not linears:
            continue
        spec, served = FORMATS[name], SERVABILITY[name]
        rows = [row for row, group in enumerate(run.layout.groups) if choice[group.name] is name]
        widths = {spec.codec.width(linear.in_features) for linear in linears} if spec.codec else set()
        yield FormatShare(
            name=str(name),
            summary=spec.summary,
            quantized=spec.codec is not None,
            groups=len(rows),
            matrices=sum(len(linear.names) for linear in linears),
            parameters=sum(linear.parameters for linear in linears),
            weight_bytes=int(sizes.weights[rows, sizes.formats.index(name)].sum()),
            # A scale for a whole row does not mind where the row is cut.
            width=max(widths) if spec.codec and not widths & {linear.in_features for linear in linears} else None,
            loads_from=served.loads_from,
            full_from=served.full_from if spec.round_activation else None,
        )


def _modules(layout: Layout, choice: Choice) -> tuple[ModuleRow, ...]:
    counts: dict[tuple[BlockKind, str], Counter[str]] = {}
    for block in layout.blocks:
        for group in block.groups:
            place = (block.kind, _numberless(group.name.removeprefix(f"{block.prefix}.")))
            counts.setdefault(place, Counter())[str(choice[group.name])] += 1
    return tuple(ModuleRow(kind=_PARTS[kind], name=name, counts=found) for (kind, name), found in counts.items())


def _kept(layout: Layout) -> tuple[Kept, ...]:
    reasons: dict[str, Counter[str]] = {}
    for name, reason in layout.ignored.items():
        reasons.setdefault(reason, Counter())[_numberless(name)] += 1
    return tuple(Kept(reason=reason, names=names) for reason, names in reasons.items())


def _numberless(name: str) -> str:
    """`model.layers.*.mlp.gate`: one name for the same module of every block."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _rounding(run: Run, choice: Choice) -> Iterator[Rounding]:
    """Gains over rounding to nearest, of the matrices in each format that ships."""
    for name, linears in linears_by_format(run.layout, choice).items():
        codec = FORMATS[name].codec
        if codec is None or not linears:
            continue
        found = {
            linear: figures
            for record in run.records[Stage.FORWARD].values()
            for linear, figures in record.metrics["linears"].items()
        }
        logs: dict[str, list[float]] = {}
        shipped: list[float] = []
        won: Counter[str] = Counter()
        for linear in linears:
            for method, errors in by_matrix(found[linear.name][codec.name]):
                won[method] += 1
                nearest = errors["nearest"]
                if nearest <= 0:
                    continue
                for other in errors.keys() - {"nearest"}:
                    logs.setdefault(other, []).append(_log_ratio(errors[other], nearest))
                shipped.append(_log_ratio(errors[method], nearest))
        yield Rounding(
            format=str(name),
            matrices=won.total(),
            ratios={other: _mean(logs[other]) for other in sorted(logs, reverse=True)},
            shipped=_mean(shipped),
            won=dict(won.most_common()),
        )


def _log_ratio(error: float, nearest: float) -> float:
    return math.log(max(error / nearest, 1e-12))


def _mean(logs: list[float]) -> float:
    """Geometric mean of the ratios; 1 where there was no error to begin with."""
    return math.exp(math.fsum(logs) / len(logs)) if logs else 1.0


def _experts(run: Run) -> Experts | None:
    seen = [tokens for record in run.records[Stage.FORWARD].values() for tokens in record.metrics["experts"].values()]
    if not seen:
        return None
    return Experts(
        layers=len(seen),
        each=max(map(len, seen)),
        fewest=min(map(min, seen)),
        unseen=sum(tokens.count(0) for tokens in seen),
    )
