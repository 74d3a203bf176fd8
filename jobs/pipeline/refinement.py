"""Choosing by measurement: plans around the optimum are measured, gains on prices learned, the plan solved again.

One half of the evaluation's sequences teaches, the other half judges: the old plan stays unless the new one is better
on tokens that it was not chosen on.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from jobs.pipeline.measured import Measured
from jobs.pipeline.measured_sweep import evaluation_session, load_evaluation_text, variant_of
from jobs.pipeline.run import Run
from prismaquant_ray import records
from prismaquant_ray.allocation.baselines import LabelledPlan
from prismaquant_ray.allocation.refine import Features, learned, neighbours, refined
from prismaquant_ray.errors import InputError
from prismaquant_ray.evaluation.divergence import Mean, mean_of
from prismaquant_ray.evaluation.variants import Variant
from prismaquant_ray.records import PlanRecord, Refinement
from prismaquant_ray.serialization import to_bytes


def chosen_plan(run: Run, measured: Measured) -> PlanRecord:
    """The plan of the budget, refined where `allocation.refine` asks for it; the refinement is also stored.

    Raises:
        InputError: there is no evaluation text, or too few sequences of it.
    """
    count = run.config.allocation.refine
    if not count:
        return measured.plan
    text = load_evaluation_text(run)[1]
    if text.texts + len(text.images) < 4:
        raise InputError("allocation.refine learns on half of the evaluation's sequences; give at least 4 of them")
    plan, planner = measured.plan, measured.planner
    features = Features.of(planner)
    plans = [plan, *neighbours(planner, plan, features, count)]
    variants = [_variant(each) for each in plans]
    with evaluation_session(run, measured, text) as session:
        session.measure(variants)
        base = session.tokens_of(variants[0])
        teaching = [_difference(session.tokens_of(each), None if index == 0 else base, half=0)
                    for index, each in enumerate(variants)]  # fmt: skip
        losses = [teaching[0].mean, *(teaching[0].mean + each.mean for each in teaching[1:])]
        sums = np.array([features.sums(planner, each.choice) for each in plans])
        gains = learned(sums, losses, [each.standard_error for each in teaching])
        other = refined(planner, plan, features, gains)
        session.measure([_variant(other)])
        judged = session.tokens_of(_variant(other))
        before, after = _difference(base, None, half=1), _difference(judged, None, half=1)
        gained = _difference(judged, base, half=1)
    result = Refinement(
        target=plan.target,
        plans=len(plans),
        gains=dict(zip(features.names, gains.tolist(), strict=True)),
        groups_changed=sum(plan.choice[group] != name for group, name in other.choice.items()),
        before=before.mean,
        after=after.mean,
        change=gained.mean,
        change_error=gained.standard_error,
        kept=gained.mean < 0,
    )
    measured.store.put(records.refinement_key(plan.target), to_bytes(result))
    run.say(summary(result))
    return other if result.kept else plan


def summary(result: Refinement) -> str:
    """What came of it, in a line."""
    if not result.groups_changed:
        return f"refined by {result.plans} measured plans: the plan stays as it is"
    verdict = "the refined plan is used" if result.kept else "the plan stays as it was"
    return (
        f"refined by {result.plans} measured plans: {result.groups_changed} groups change, KL on the other half "
        f"{result.before:.5f} to {result.after:.5f} ({result.change:+.5f} ± {result.change_error:.5f}): {verdict}"
    )


def _variant(plan: PlanRecord) -> Variant:
    return variant_of(LabelledPlan.of(plan), activations=True)


def _difference(tokens: dict[str, Tensor], other: dict[str, Tensor] | None, *, half: int) -> Mean:
    """Mean KL of a variant, or that minus another's, on every other sequence, beginning with `half`."""
    kl = tokens["kl"].double() if other is None else tokens["kl"].double() - other["kl"].double()
    own = tokens["sequence"] % 2 == half
    return mean_of(kl[own], tokens["sequence"][own] // 2)
