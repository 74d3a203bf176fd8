"""Reports to test: of tiny runs, with measurements made up after the schema of plans/measured.json, and large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jobs.pipeline.measured import Measured
from jobs.pipeline.run import Run
from prismaquant_ray import records
from prismaquant_ray.config import Config
from prismaquant_ray.formats import FormatName
from prismaquant_ray.records import (
    Divergence,
    EvaluationText,
    MeasuredKnee,
    MeasuredPlan,
    MeasuredPlans,
    PlanRecord,
    SourceFigures,
)
from prismaquant_ray.report.findings import Findings
from prismaquant_ray.report.group_findings import BlockFindings, GroupColumns
from prismaquant_ray.report.groups import composition
from prismaquant_ray.serialization import to_bytes
from tests.inprocess import unopened
from tests.runs import family_configuration, measured

#: A name that would end its element, its attribute or a script, if anybody let it.
HOSTILE = "</script><script>document.title='caught'</script><img src=x onerror=\"document.title='caught'\">'&{{7*7}}"


def measured_run(directory: Path, source: Path, *overrides: str, images: int = 0) -> Measured:
    """A finished run of a tiny checkpoint."""
    config = family_configuration(directory, source, *overrides, images=images)
    measured(config, workers=2)
    return reopened(config)


def reopened(config: Config) -> Measured:
    """The finished run of a configuration; it needs no workers."""
    return Run(config, open_workers=unopened).measured()


def findings_of(known: Measured) -> Findings:
    """What the run found, read anew."""
    known = reopened(known.config)
    return known.findings(known.plan)


def divergence(kl: float, draft: bool = False) -> Divergence:
    """Plausible figures of a plan with so much mean KL."""
    return Divergence(
        tokens=1024,
        kl_mean=kl,
        kl_standard_error=0.02 * kl,
        kl_p90=2 * kl,
        kl_p99=6 * kl,
        top1_agreement=1 - kl / 2,
        loss=2.8 + kl,
        perplexity=17.2 * (1 + kl),
        draft_agreement=0.71 if draft else None,
    )


def measured_plan(plan: PlanRecord, **changes: Any) -> MeasuredPlan:
    """A plan as measured, without figures unless they are given."""
    shared = ("target", "objective", "bpp", "weight_bytes", "groups", "predicted_loss", "standard_error", "choice")
    body = {key: getattr(plan, key) for key in shared}
    body |= {"kind": "plan", "label": plan.target, "weights": None, "behind_plan": None}
    return MeasuredPlan(**(body | {"activations": divergence(0.1)} | changes))


def measurements(plans: Sequence[MeasuredPlan], **changes: Any) -> MeasuredPlans:
    """`plans/measured.json` with these plans."""
    body: dict[str, Any] = {
        "code": "0",
        "run": "",
        "text": EvaluationText(file="evaluation.txt", sha256="0" * 64, sequences=2, tokens=1024, images=0),
        "calibration_tokens": 192,
        "source": SourceFigures(loss=2.8, perplexity=17.2),
        "plans": list(plans),
        "knee": None,
    }
    return MeasuredPlans(**(body | changes))


def add_measurements(known: Measured, draft: bool = False) -> MeasuredPlans:
    """Write plausible figures of every plan and control into the run store."""
    plans: list[MeasuredPlan] = []
    for plan in known.sweep.targets:
        loss = plan.predicted_loss + 1e-3
        plans.append(measured_plan(plan, weights=divergence(loss / 3, draft), activations=divergence(loss, draft)))
        mixed = dict.fromkeys(plan.choice, FormatName.BF16)
        label, figures = f"{plan.target}, mixed", divergence(1.4 * loss, draft)
        plans.append(measured_plan(plan, kind="mixture", label=label, choice=mixed, activations=figures))
    for name in (FormatName.NVFP4, FormatName.MXFP8):
        uniform: dict[str, Any] = {"kind": "uniform", "label": f"all {name}", "target": None, "objective": None}
        uniform |= {"bpp": 4.5, "choice": {}, "predicted_loss": 0.2, "activations": divergence(0.2, draft)}
        plans.append(measured_plan(known.sweep.targets[0], **uniform))
    body = measurements(
        plans,
        run=known.run_store.run,
        source=SourceFigures(loss=2.8, perplexity=17.2, draft_agreement=0.8 if draft else None),
        knee=MeasuredKnee(bpp=5.25, kl=0.13, from_bpp=4.5, to_bpp=8.25, stability=[]),
    )
    known.store.put(records.MEASURED_PLANS, to_bytes(body))
    return body


def enlarged(small: Findings, layers: int) -> Findings:
    """The findings of a model like a small dense one, with so many layers and a name that means harm."""
    decoder = [block for block in small.blocks if block.kind == "decoder"]
    assert len(decoder) == len(small.blocks), "a dense one, please"
    rows = [row for row, block in enumerate(small.groups.block) if block == decoder[0].index]
    blocks = [BlockFindings(index=i, kind="decoder", prefix=f"model.layers.{i}", label=str(i)) for i in range(layers)]

    def repeated(values: Sequence[Any]) -> list[Any]:
        return [values[row] for _ in range(layers) for row in rows]

    columns: dict[str, Any] = {}
    for field in fields(GroupColumns):
        values = getattr(small.groups, field.name)
        by_format = isinstance(values, dict)
        columns[field.name] = {k: repeated(v) for k, v in values.items()} if by_format else repeated(values)
    # Layers differ, as those of a model do.
    for costs in columns["cost"].values():
        costs[:] = [None if v is None else v * (1 + 0.01 * (row // len(rows))) for row, v in enumerate(costs)]
    columns["block"] = [layer for layer in range(layers) for _ in rows]
    names = zip(columns["block"], columns["module"], strict=True)
    columns["name"] = [f"model.layers.{layer}.{module}" for layer, module in names]
    columns["name"][0] = HOSTILE
    groups = GroupColumns(**columns)
    plans = [replace(plan, choice="".join(repeated(plan.choice))) for plan in small.plans]
    linears = [entry for entry in small.rounding.linears if entry.block == decoder[0].index]
    return replace(
        small,
        model=replace(small.model, title=HOSTILE, kept={HOSTILE: [HOSTILE]}),
        plans=plans,
        blocks=blocks,
        groups=groups,
        composition=composition(groups, blocks, small.formats, plans[small.budget].choice),
        rounding=replace(
            small.rounding,
            linears=[
                replace(entry, block=layer, linear=f"model.layers.{layer}.{entry.module}")
                for layer in range(layers)
                for entry in linears
            ],
        ),
    )
