"""The measured frontier: every plan of the sweep and its controls, evaluated from the stored candidates.

Controls are plans that know no prices: one format for all groups, an even mixture of two formats with at least the
bytes of the plan it is compared with, and the plan that `fisher_trace` makes for the same budget. Nothing that is
measured here changes a plan.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from jobs import inputs, planning
from jobs.evaluation import Bench
from jobs.run import Run
from prismaquant_ray import __version__
from prismaquant_ray.allocation.frontier import sweep
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.stored import read_calibration
from prismaquant_ray.config import BudgetConfig, EvaluationConfig
from prismaquant_ray.errors import InputError
from prismaquant_ray.evaluation.comparison import knee_of
from prismaquant_ray.evaluation.variants import Variant
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.storage.connection import absolute

MEASURED = "plans/measured.json"
# Steps of the golden ratio are spread evenly over depth, however many are taken.
_GOLDEN = (5**0.5 - 1) / 2

Choice = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan to be measured; `target` is the budget it belongs to, None for one format throughout."""

    kind: str
    label: str
    target: str | None
    objective: str | None
    choice: Choice


def measured_sweep(run: Run, swept: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every target of a sweep and its controls; the result is also stored under plans/."""
    plans = [_plan(plan) for plan in swept["targets"]]
    result = _measured(run, [*plans, *_controls(run, swept["targets"])])
    run.store.put(MEASURED, json.dumps(result, indent=1).encode())
    return result


def measured_plan(run: Run, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one plan; it joins what is stored of the same text, in the place of an earlier plan for its target."""
    result = _measured(run, [_plan(plan)])
    before = run.stored(MEASURED, made_by="sweep --measure")
    if before is not None and before["text"] == result["text"] and before["code"] == result["code"]:
        (entry,) = result["plans"]
        others = [e for e in before["plans"] if (e["kind"], e["target"]) != (entry["kind"], entry["target"])]
        result = {**before, "plans": [*others, entry]}
    run.store.put(MEASURED, json.dumps(result, indent=1).encode())
    return result


def check(run: Run) -> None:
    """InputError unless the configuration says what to measure on, and the text is long enough."""
    _tokens(run)


def _plan(plan: Mapping[str, Any]) -> Candidate:
    return Candidate("plan", str(plan["target"]), plan["target"], plan["objective"], plan["choice"])


# Controls -----------------------------------------------------------------------------------------------------------


def _controls(run: Run, targets: Sequence[Mapping[str, Any]]) -> Iterator[Candidate]:
    formats = [name for name in run.sizes.formats if FORMATS[name].codec is not None]
    for name in formats:
        yield Candidate("uniform", f"all {name}", None, None, _named(run, _uniform(run, name)))
    for plan in targets:
        columns = _even(run, plan["weight_bytes"])
        if columns is not None:
            yield Candidate("mixture", f"{plan['target']}, evenly mixed", plan["target"], None, _named(run, columns))
    budgets = [BudgetConfig(bpp=float(str(plan["target"]).removesuffix("bpp"))) for plan in targets]
    trace = np.where(run.sizes.allowed, run.table.fisher_trace, np.nan)
    model = planning.problem(run, budgets[0]).with_cost(trace)
    found = sweep(model, [run.sizes.limit(budget) for budget in budgets], run.sizes.second)
    for plan, other in zip(targets, found, strict=True):
        label = f"{plan['target']}, by fisher_trace"
        yield Candidate("fisher_trace", label, plan["target"], "fisher_trace", other.choice)


def _uniform(run: Run, name: FormatName) -> NDArray[np.int64]:
    """Column of each group: a format, or the smallest that a group can take instead."""
    sizes = run.sizes
    smallest = np.where(sizes.allowed, sizes.weights, np.iinfo(np.int64).max).argmin(axis=1)
    column = sizes.formats.index(name)
    return np.where(sizes.allowed[:, column], column, smallest)


def _even(run: Run, least: int) -> NDArray[np.int64] | None:
    """The two neighbouring formats of a size, spread evenly over depth, with at least so many bytes of weights.

    None when the smallest format already has them, or no mixture of neighbours reaches them.
    """
    rows = np.arange(len(run.layout.groups))
    uniform = sorted(
        (_uniform(run, name) for name in run.sizes.formats), key=lambda c: int(run.sizes.weights[rows, c].sum())
    )
    weights = [int(run.sizes.weights[rows, columns].sum()) for columns in uniform]
    for small, large, low, high in zip(uniform, uniform[1:], weights, weights[1:], strict=False):
        if not low < least <= high:
            continue
        columns, total = small.copy(), low
        for row in np.argsort((rows + 1) * _GOLDEN % 1.0, kind="stable"):
            if total >= least:
                break
            total += int(run.sizes.weights[row, large[row]] - run.sizes.weights[row, small[row]])
            columns[row] = large[row]
        return columns
    return None


def _named(run: Run, columns: NDArray[np.int64]) -> dict[str, str]:
    pairs = zip(run.layout.groups, columns, strict=True)
    return {group.name: str(run.sizes.formats[column]) for group, column in pairs}


def render(result: Mapping[str, Any], console: Console) -> None:
    """Predicted and measured loss of every plan, and what follows from them."""
    text = result["text"]
    console.print(
        f"measured on {text['tokens']:,} tokens of {text['file']}; the source's perplexity there is "
        f"{result['source']['perplexity']:.3f}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for title in (
        "plan",
        "bpp",
        "predicted",
        "measured",
        "±",
        "predicted/measured",
        "weights only",
        "99 %",
        "top-1",
        "behind plan",
    ):
        table.add_column(title, justify="left" if title == "plan" else "right")
    for entry in result["plans"]:
        both, weights, behind = entry["activations"], entry["weights"], entry["behind_plan"]
        table.add_row(
            entry["label"],
            f"{entry['bpp']:.4f}",
            f"{entry['predicted_loss']:.5f}",
            f"{both['kl_mean']:.5f}",
            f"{both['kl_standard_error']:.5f}",
            f"{entry['predicted_loss'] / both['kl_mean']:.3f}" if both["kl_mean"] else "",
            "" if weights is None else f"{weights['kl_mean']:.5f}",
            f"{both['kl_p99']:.4f}",
            f"{both['top1_agreement']:.2%}",
            "" if behind is None else f"{behind['kl']:+.5f} ± {behind['standard_error']:.5f}",
        )
    console.print(table)
    knee = result["knee"]
    if knee is not None:
        others = ", ".join(
            f"{each['bpp']:.3f} from {each['from_bpp']:.3f} to {each['to_bpp']:.3f}" for each in knee["stability"]
        )
        console.print(
            f"measured knee: {knee['bpp']:.3f} bits per parameter at {knee['kl']:.5f} nats/token (from "
            f"{knee['from_bpp']:.3f} to {knee['to_bpp']:.3f}; {others})",
            soft_wrap=True,
        )


# Measuring ----------------------------------------------------------------------------------------------------------


def _measured(run: Run, candidates: Sequence[Candidate]) -> dict[str, Any]:
    settings, tokens = _tokens(run)
    with run.claimed(), run.logged() as (events, _):
        assert run.lease is not None
        bench = Bench(
            config=run.config,
            source=run.source,
            layout=run.layout,
            tokens=tokens,
            store=run.store,
            events=events,
            check=run.lease.check,
            open_workers=run.open_workers,
            candidates=absolute(run.config.store.run),
        )
        wanted = [(entry, activations) for entry in candidates for activations in _ways(entry)]
        reference, *found = bench.measure([_variant(entry.choice, activations) for entry, activations in wanted])
        plans_by_target = {entry.target: entry for entry in candidates if entry.kind == "plan"}
        behind = {
            id(entry): bench.difference(_variant(entry.choice, True), _variant(plan.choice, True))
            for entry in candidates
            if entry.kind != "plan" and (plan := plans_by_target.get(entry.target)) is not None
        }
    figures = {(id(entry), activations): each for (entry, activations), each in zip(wanted, found, strict=True)}
    entries = [
        {
            **_described(run, entry),
            "weights": figures.get((id(entry), False)),
            "activations": figures[id(entry), True],
            "behind_plan": _behind(behind.get(id(entry))),
        }
        for entry in candidates
    ]
    plans = [entry for entry in entries if entry["kind"] == "plan"]
    return {
        "code": __version__,
        "text": {
            "file": settings.text.name,
            "sha256": hashlib.sha256(settings.text.read_bytes()).hexdigest(),
            "sequences": tokens.texts,
            "tokens": reference["tokens"],
            "images": len(tokens.images),
        },
        "calibration_tokens": read_calibration(run.store).positions,
        "source": {key: reference[key] for key in ("loss", "perplexity", "draft_agreement") if key in reference},
        "plans": entries,
        "knee": knee_of([(entry["bpp"], entry["activations"]["kl_mean"]) for entry in plans]),
    }


def _tokens(run: Run) -> tuple[EvaluationConfig, CalibrationSet]:
    settings = run.config.evaluation
    if settings is None:
        raise InputError(
            "nothing says what to measure on; give evaluation: {text: FILE}, a text calibration has not seen"
        )
    if settings.images is not None and run.config.calibration.images is None:
        raise InputError("evaluation.images needs calibration.images: without them the vision tower is not measured")
    return settings, inputs.load_tokens(
        run.source,
        run.layout,
        settings.text,
        settings.images,
        sequences=settings.sequences,
        length=settings.length,
        seed=run.config.calibration.seed,
        holdout=0.0,
    )


def _behind(difference: tuple[float, float] | None) -> dict[str, float] | None:
    """How much higher a control's measured KL is than the plan's for the same target; None without such a plan."""
    return None if difference is None else {"kl": difference[0], "standard_error": difference[1]}


def _ways(entry: Candidate) -> tuple[bool, ...]:
    """With activations always; plans and single formats also without."""
    return (False, True) if entry.kind in ("plan", "uniform") else (True,)


def _variant(choice: Choice, activations: bool) -> Variant:
    return Variant(choice={group: FormatName(name) for group, name in choice.items()}, activations=activations)


def _described(run: Run, entry: Candidate) -> dict[str, Any]:
    """A candidate as people and programs read it; predictions are of what is measured, so no draft head is in them."""
    sizes, table = run.sizes, run.table
    column_of = {str(name): column for column, name in enumerate(sizes.formats)}
    columns = [column_of[entry.choice[group.name]] for group in run.layout.groups]
    rows = np.arange(len(columns))
    weights = int(sizes.weights[rows, columns].sum())
    body = np.array([run.layout.block_of[group.name].kind is not BlockKind.DRAFT for group in run.layout.groups])
    costs = np.where(body, table.token_fisher[rows, columns], 0.0)
    errors = np.where(body, table.standard_error[rows, columns], 0.0)
    counts = Counter(entry.choice.values())
    return {
        "target": entry.target,
        "kind": entry.kind,
        "label": entry.label,
        "objective": entry.objective,
        "bpp": sizes.bpp(weights),
        "weight_bytes": weights,
        "groups": {str(name): counts.get(str(name), 0) for name in sizes.formats},
        "predicted_loss": float(costs.sum()),
        "standard_error": float(np.sqrt(np.square(errors).sum())),
        "choice": dict(entry.choice),
    }
