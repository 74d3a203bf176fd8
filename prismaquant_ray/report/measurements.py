"""Measured losses, matched to the plans of a run by their exact choice of formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prismaquant_ray.formats import FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.records import CacheType, MeasuredPlan, MeasuredPlans, PlanRecord
from prismaquant_ray.report.findings import MeasuredFindings, MeasuredLosses, OtherMeasured
from prismaquant_ray.report.groups import encoded


def measured_of(measured: MeasuredPlans | None, plan: PlanRecord) -> MeasuredLosses | None:
    """Measured losses of a plan, matched by target and choice; None if there are none."""
    plans = [entry for entry in measured.plans if entry.kind == "plan"] if measured else []
    wanted = plan.target, plan.choice, plan.kv_cache
    same = [entry for entry in plans if (entry.target, entry.choice, entry.kv_cache) == wanted]
    return _losses(same[-1]) if same else None


def measured_choices(measured: MeasuredPlans | None, layout: Layout) -> dict[tuple[str, CacheType], MeasuredLosses]:
    """Measured losses by choice (one letter per group) and type of KV cache, for any target."""
    found: dict[tuple[str, CacheType], MeasuredLosses] = {}
    for entry in measured.plans if measured else ():
        if entry.choice.keys() == layout.block_of.keys():
            found.setdefault((encoded(entry.choice, layout), entry.kv_cache), _losses(entry))
    return found


def measured_uniform(measured: MeasuredPlans | None, name: str, cache: CacheType) -> MeasuredLosses | None:
    """Measured losses with one format everywhere, and this type of KV cache."""
    plans = measured.plans if measured else []
    entries = [entry for entry in plans if _uniform(entry) == name and entry.kv_cache == cache]
    return _losses(entries[-1]) if entries else None


def measured_findings(
    measured: MeasuredPlans | None, choices: Mapping[str, Mapping[str, FormatName]], formats: Sequence[str]
) -> MeasuredFindings | None:
    """The measured findings; `choices` has the choice of every target's plan, `formats` the formats of the run."""
    if measured is None:
        return None
    plans = [entry for entry in measured.plans if entry.kind == "plan"]
    others = [entry for entry in measured.plans if entry.kind != "plan" and _uniform(entry) not in formats]
    return MeasuredFindings(
        text=measured.text,
        calibration_tokens=measured.calibration_tokens,
        source=measured.source,
        knee=measured.knee,
        others=[_other(entry) for entry in others],
        stale=[entry.label for entry in plans if choices.get(str(entry.target)) != entry.choice],
    )


def _uniform(entry: MeasuredPlan) -> str | None:
    """The format that every group has."""
    return entry.label.removeprefix("all ") if entry.kind == "uniform" else None


def _losses(entry: MeasuredPlan) -> MeasuredLosses:
    return MeasuredLosses(weights=entry.weights, activations=entry.activations)


def _other(entry: MeasuredPlan) -> OtherMeasured:
    return OtherMeasured(
        kind=entry.kind,
        label=entry.label,
        target=entry.target,
        bpp=entry.bpp,
        weight_bytes=entry.weight_bytes,
        objective=entry.objective,
        predicted_loss=entry.predicted_loss,
        weights=entry.weights,
        activations=entry.activations,
    )
