"""Measuring the loss of plans and their baselines from the stored candidates. Plans do not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from jobs.pipeline import sources
from jobs.pipeline.evaluation import EvaluationSession, source_figures
from jobs.pipeline.measured import Measured
from jobs.pipeline.run import Run
from prismaquant_ray import __version__, records
from prismaquant_ray.allocation.baselines import LabelledPlan, baselines
from prismaquant_ray.allocation.plans import columns_of, count_groups
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.errors import InputError
from prismaquant_ray.evaluation.comparison import measured_knee
from prismaquant_ray.evaluation.variants import Variant
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.records import Divergence, EvaluationText, Excess, MeasuredPlan, MeasuredPlans, PlanRecord
from prismaquant_ray.serialization import to_bytes
from prismaquant_ray.settings.data import EvaluationConfig
from prismaquant_ray.settings.texts import names_of
from prismaquant_ray.storage.connection import absolute


def measure_sweep(run: Run, measured: Measured) -> MeasuredPlans:
    """Measure every target of the sweep and its baselines; the result is also stored."""
    targets = measured.sweep.targets
    plans = [*map(LabelledPlan.of, targets), *baselines(measured.planner, targets)]
    result = _measure(run, measured, plans)
    measured.store.put(records.MEASURED_PLANS, to_bytes(result))
    return result


def measure_plan(run: Run, measured: Measured, plan: PlanRecord) -> MeasuredPlans:
    """Measure one plan. It is added to stored results of the same text, replacing an earlier plan for its target."""
    result = _measure(run, measured, [LabelledPlan.of(plan)])
    before = measured.measured_plans()
    if before is not None and before.text == result.text and before.code == result.code:
        (entry,) = result.plans
        others = [each for each in before.plans if (each.kind, each.target) != (entry.kind, entry.target)]
        result = replace(before, plans=[*others, entry])
    measured.store.put(records.MEASURED_PLANS, to_bytes(result))
    return result


def load_evaluation_text(run: Run) -> tuple[EvaluationConfig, CalibrationSet]:
    """The settings and tokens of the evaluation.

    Raises:
        InputError: `evaluation` is not configured, or the text is too short.
    """
    settings = run.config.evaluation
    if settings is None:
        raise InputError(
            "nothing says what to measure on; give evaluation: {text: FILE}, a text calibration has not seen, or "
            "evaluation: {}, the mix"
        )
    if settings.images is not None and run.config.calibration.images is None:
        raise InputError("evaluation.images needs calibration.images: without them the vision tower is not measured")
    return settings, sources.load_tokens(run.source, run.layout, settings, run.reader, seed=run.config.calibration.seed)


@contextmanager
def evaluation_session(run: Run, measured: Measured, text: CalibrationSet) -> Iterator[EvaluationSession]:
    """Inside the with-block, plans of a run can be measured on a text."""
    with run.claimed() as lease, run.logged() as (events, _):
        events(sources.texts_read("evaluation", text))
        yield EvaluationSession(
            config=run.config,
            source=run.source,
            layout=run.layout,
            text=text,
            store=measured.store,
            events=events,
            check=lease.check,
            open_workers=run.open_workers,
            candidates=absolute(run.config.store.run),
        )


def _measure(run: Run, measured: Measured, plans: Sequence[LabelledPlan]) -> MeasuredPlans:
    settings, text = load_evaluation_text(run)
    with evaluation_session(run, measured, text) as session:
        wanted = [(place, activations) for place, plan in enumerate(plans) for activations in _ways(plan)]
        source, *found = session.measure(
            [variant_of(plans[place], activations=activations) for place, activations in wanted]
        )
        figures = dict(zip(wanted, found, strict=True))
        behind = _behind(session, plans)
    entries = [
        _entry(measured, plan, figures.get((place, False)), figures[place, True], behind[place])
        for place, plan in enumerate(plans)
    ]
    curve = [(entry.bpp, entry.activations.kl_mean) for entry in entries if entry.kind == "plan"]
    return MeasuredPlans(
        code=__version__,
        run=measured.run_store.run,
        text=EvaluationText(
            file=names_of(settings.text),
            sha256=sources.text_digest(settings, run.reader),
            sequences=text.texts,
            tokens=source.tokens,
            images=len(text.images),
            sources=text.sources,
        ),
        calibration_tokens=measured.calibration.positions,
        source=source_figures(source),
        plans=entries,
        knee=measured_knee(curve),
    )


def _behind(session: EvaluationSession, plans: Sequence[LabelledPlan]) -> list[Excess | None]:
    """Excess of each baseline's KL over that of the plan for the same target; None without such a plan."""
    plan_of = {plan.target: plan for plan in plans if plan.kind == "plan"}
    found: list[Excess | None] = []
    for plan in plans:
        other = None if plan.kind == "plan" else plan_of.get(plan.target)
        found.append(
            None
            if other is None
            else session.excess(variant_of(plan, activations=True), variant_of(other, activations=True))
        )
    return found


def _ways(plan: LabelledPlan) -> tuple[bool, ...]:
    """Whether activations are rounded, for each measurement: always with; plans and single formats also without."""
    return (False, True) if plan.kind in ("plan", "uniform") else (True,)


def variant_of(plan: LabelledPlan, *, activations: bool) -> Variant:
    """A plan to be measured, with or without rounded activations; the KV cache is rounded with the activations."""
    return Variant(choice=dict(plan.choice), activations=activations, cache=activations and plan.kv_cache == "fp8")


def _entry(
    measured: Measured, plan: LabelledPlan, weights: Divergence | None, activations: Divergence, behind: Excess | None
) -> MeasuredPlan:
    """A measured plan with its predictions, both without the draft head."""
    layout, sizes, table = measured.layout, measured.sizes, measured.planner.table
    columns = columns_of(plan.choice, layout, sizes.formats)
    rows = np.arange(len(columns))
    size = int(sizes.weights[rows, columns].sum())
    body = np.array([layout.block_of[group.name].kind is not BlockKind.DRAFT for group in layout.groups])
    costs = np.where(body, table.token_fisher[rows, columns], 0.0)
    errors = np.where(body, table.standard_error[rows, columns], 0.0)
    cache = measured.planner.cache_cost(plan.kv_cache)
    return MeasuredPlan(
        target=plan.target,
        kind=plan.kind,
        label=plan.label,
        objective=plan.objective,
        bpp=sizes.bpp(size),
        weight_bytes=size,
        groups=count_groups(plan.choice, sizes.formats),
        predicted_loss=float(costs.sum()) + cache.body,
        standard_error=float(np.sqrt(np.square(errors).sum() + cache.body_standard_error**2)),
        choice=dict(plan.choice),
        weights=weights,
        activations=activations,
        behind_plan=behind,
        kv_cache=plan.kv_cache,
    )
