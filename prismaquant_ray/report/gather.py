"""Gathering the findings of a run from its records, prices, plans and events.

Pure except for the clock and installed versions: no store is read, and no plan is solved.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from prismaquant_ray.allocation.baselines import uniform_columns
from prismaquant_ray.allocation.plans import Planner
from prismaquant_ray.allocation.surface import surface
from prismaquant_ray.events import PlacedRepository, RepositoryWritten
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.records import MeasuredPlans, PlanRecord, SweepRecord
from prismaquant_ray.report import groups
from prismaquant_ray.report.findings import (
    SCHEMA,
    CalibrationFindings,
    Findings,
    FormatFindings,
    FrontierCurve,
    ModelFindings,
    PlanFindings,
    RepositoryFindings,
    SurfaceCurve,
    UniformFindings,
)
from prismaquant_ray.report.group_findings import BlockFindings, ExpertFindings, GroupColumns
from prismaquant_ray.report.measurements import measured_findings, measured_of, measured_uniform
from prismaquant_ray.report.rounding_gain import rounding
from prismaquant_ray.report.run_data import RunData
from prismaquant_ray.report.timings import machines, timings, versions
from prismaquant_ray.settings.model import ModelConfig
from prismaquant_ray.settings.texts import names_of

#: An expert is cold when it saw less than this share of the mean of its layer.
COLD = 0.1
_EXAMPLE = (4096, 4096)


def gather(
    data: RunData,
    planner: Planner,
    plan: PlanRecord,
    sweep: SweepRecord | None,
    measured: MeasuredPlans | None,
    *,
    planning_seconds: float,
) -> Findings:
    """The findings of a run, with `plan` as the budget's; `sweep` is None where no target is within reach."""
    config = data.config
    objective = config.allocation.objective
    formats, blocks = format_findings(config.formats), block_findings(data.layout)
    columns = groups.group_columns(data, objective)
    by_target = {entry.target: entry for entry in (*(sweep.targets if sweep else ()), plan)}
    records = sorted(by_target.values(), key=lambda entry: entry.weight_bytes)
    plans = [_plan(entry, data.layout, measured) for entry in records]
    place = next(index for index, entry in enumerate(records) if entry is plan)
    return Findings(
        schema=SCHEMA,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        run=data.uri,
        model=_model(data),
        formats=formats,
        objective=objective,
        budget=place,
        plans=plans,
        out_of_reach=sweep.out_of_reach if sweep else sorted(set(config.sweep)),
        uniform=uniform(columns, formats, planner, measured),
        frontier=_frontier(planner),
        surface=[
            SurfaceCurve(
                prefill=curve.prefill,
                bpp=[planner.sizes.bpp(int(size)) for size in curve.bytes],
                predicted_loss=(curve.cost + planner.cache_cost(planner.fixed_cache).cost).tolist(),
            )
            for curve in surface(planner)
        ],
        knee=sweep.knee if sweep else None,
        measured=measured_findings(
            measured,
            {target: entry.choice for target, entry in by_target.items()},
            [entry.name for entry in formats],
        ),
        blocks=blocks,
        groups=columns,
        composition=groups.composition(columns, blocks, formats, plans[place].choice),
        repository=_repository(data, plan),
        rounding=rounding(data),
        experts=expert_findings(data),
        draft=groups.draft(data, columns, formats),
        calibration=_calibration(data),
        timings=timings(data.events, planning_seconds),
        machines=machines(data.events, data.peak_bytes),
        versions=versions(),
        settings=config.model_dump(mode="json"),
    )


def format_findings(names: Iterable[FormatName]) -> list[FormatFindings]:
    """The formats of a run, smallest first."""
    chosen = set(names)
    return [
        FormatFindings(
            name=str(name),
            letter=format_.letter,
            bits=format_.bits(*_EXAMPLE),
            codec=format_.codec.name if format_.codec else None,
            summary=format_.summary,
            needs=format_.served.needs,
        )
        for name, format_ in FORMATS.items()
        if name in chosen
    ]


def block_findings(layout: Layout) -> list[BlockFindings]:
    """Every block."""
    return [
        BlockFindings(
            index=block.index,
            kind=str(block.kind),
            prefix=block.prefix,
            label=block.prefix.rpartition(".")[2] or "head",
        )
        for block in layout.blocks
    ]


def expert_findings(data: RunData) -> list[ExpertFindings]:
    """Calibration tokens of every routed expert, by layer."""
    return [
        ExpertFindings(
            group=name,
            block=block.index,
            experts=len(tokens),
            even=(even := sum(tokens) / len(tokens)),
            fewest=min(tokens),
            median=statistics.median(tokens),
            most=max(tokens),
            unseen=sum(count == 0 for count in tokens),
            cold=sum(0 < count < COLD * even for count in tokens),
            tokens=list(tokens),
        )
        for block in data.layout.blocks
        for name, tokens in data.forward[block.index].experts.items()
    ]


def _model(data: RunData) -> ModelFindings:
    layout, source, model = data.layout, data.source, data.config.model
    reasons: dict[str, list[str]] = {}
    for name, reason in layout.ignored.items():
        reasons.setdefault(reason, []).append(name)
    return ModelFindings(
        title=_title(model),
        source=model.source,
        revision=model.revision,
        architecture=layout.architecture,
        family=layout.family,
        guesses=list(layout.guesses),
        parameters=sum(math.prod(info.shape) for info in source.tensors.values()),
        quantizable_parameters=layout.parameters,
        linears=sum(len(linear.names) for linear in layout.linears()),
        source_bytes=sum(info.nbytes for info in source.stored.values()),
        kept=reasons,
    )


def _title(model: ModelConfig) -> str:
    """The hub id, or the last part of a path or URI."""
    if "://" in model.source or Path(model.source).is_dir():
        return model.source.rstrip("/").rpartition("/")[2]
    return model.source


def _plan(plan: PlanRecord, layout: Layout, measured: MeasuredPlans | None) -> PlanFindings:
    return PlanFindings(
        target=plan.target,
        bpp=plan.bpp,
        predicted_loss=plan.predicted_loss,
        gap=plan.gap,
        weight_bytes=plan.weight_bytes,
        repository_bytes_at_most=plan.repository_bytes_at_most,
        groups={str(name): count for name, count in plan.groups.items()},
        loaded_bytes=plan.loaded_bytes,
        vram=plan.vram,
        times=plan.times,
        standard_error=plan.standard_error if plan.objective == "token_fisher" else None,
        choice=groups.encoded(plan.choice, layout),
        measured=measured_of(measured, plan),
        kv_cache=plan.kv_cache,
        kv_cache_loss=plan.kv_cache_loss,
        kv_cache_error=plan.kv_cache_error,
    )


def uniform(
    columns: GroupColumns, formats: Sequence[FormatFindings], planner: Planner, measured: MeasuredPlans | None
) -> list[UniformFindings]:
    """Every group in one format, with the KV cache of the sweep's plans."""
    cache = planner.cache_cost(planner.fixed_cache)
    sizes, times, limits = planner.sizes, planner.times, planner.config.allocation.limits
    parameters = sum(columns.parameters)
    stored = {str(name): int(sizes.stored[:, i].sum()) + sizes.fixed for i, name in enumerate(sizes.formats)}
    found = []
    for name in (entry.name for entry in formats):
        there = [size for size in columns.bytes[name] if size is not None]
        size = sum(there) if len(there) == len(columns.name) else None
        cost = groups.total(columns.cost[name])
        found.append(
            UniformFindings(
                format=name,
                bpp=None if size is None else 8 * size / parameters,
                weight_bytes=size,
                repository_bytes_at_most=None if size is None else stored[name],
                times=None if size is None else times.of_plan(uniform_columns(sizes, FormatName(name)), limits),
                predicted_loss=None if cost is None else cost + cache.cost,
                standard_error=None
                if cost is None
                else groups.root_sum_square([*columns.standard_error[name], cache.standard_error]),
                measured=measured_uniform(measured, name, planner.fixed_cache),
            )
        )
    return found


def _frontier(planner: Planner) -> FrontierCurve:
    """The whole frontier."""
    sizes, costs = planner.curve()
    return FrontierCurve(
        bpp=[planner.sizes.bpp(int(size)) for size in sizes],
        predicted_loss=np.maximum(costs, 0.0).tolist(),
    )


def _repository(data: RunData, plan: PlanRecord) -> RepositoryFindings:
    source, layout = data.source, data.layout
    quantizable = {name for linear in layout.linears() for name in linear.sources}
    ignored = {name: info.nbytes for name, info in source.tensors.items() if name not in quantizable}
    embedding = sum(size for name, size in ignored.items() if name in layout.embedding)
    written = (event for event in reversed(data.events) if isinstance(event, RepositoryWritten))
    last = next((event for event in written if event.target == plan.target), None)
    return RepositoryFindings(
        written=None
        if last is None
        else PlacedRepository(uri=last.uri, target=last.target, bpp=last.bpp, bytes=last.bytes, seconds=last.seconds),
        quantizable_bytes=plan.weight_bytes,
        embedding_bytes=embedding,
        other_tensor_bytes=sum(ignored.values()) - embedding,
        at_most_bytes=plan.repository_bytes_at_most,
    )


def _calibration(data: RunData) -> CalibrationFindings:
    calibration = data.config.calibration
    return CalibrationFindings(
        text=names_of(calibration.text),
        sequences=calibration.sequences,
        length=calibration.length,
        tokens=calibration.sequences * calibration.length,
        priced_tokens=max(found.tokens for found in data.backward.values()),
        images=None if calibration.images is None else calibration.images.name,
        digest=data.calibration.fingerprint,
        sources=data.calibration.sources,
        fingerprint=data.fingerprint,
    )
