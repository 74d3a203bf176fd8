"""Claims about the measured frontier: what is measured is what would ship, and controls are what they say."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.commands import quantize, sweep
from jobs.pipeline.measured_sweep import measure_plan, measure_sweep
from jobs.pipeline.repository_evaluation import evaluate
from jobs.pipeline.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.evaluation.comparison import measured_knee
from prismaquant_ray.events import read_events
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.serialization import to_json
from prismaquant_ray.settings.budget import BudgetConfig
from prismaquant_ray.settings.data import EvaluationConfig
from tests.inprocess import in_process, unopened
from tests.runs import assembled, family_configuration
from tests.tiny import make_checkpoint
from tests.tiny_families import make_family

TARGETS = (4.75, 5.5, 6.5, 7.5, 9.0)
configuration = partial(family_configuration, sweep=TARGETS, evaluation=True)


@dataclasses.dataclass
class Measured:
    config: Config
    run: Run
    result: dict[str, Any]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.result["plans"] if entry["kind"] == kind]


def swept(run: Run) -> dict[str, Any]:
    """What `sweep --measure` stores."""
    return to_json(run.repairing(lambda known: measure_sweep(run, known)))


def planned(run: Run) -> dict[str, Any]:
    """What `quantize` stores of its plan's measured loss."""
    return to_json(run.repairing(lambda known: measure_plan(run, known, known.plan)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    directory = tmp_path_factory.mktemp("frontier")
    config = configuration(directory, make_checkpoint(directory / "source", "llama_untied"))
    run = Run(config, open_workers=in_process(2))
    run.measure()
    return Measured(config, run, swept(run))


def test_every_target_and_its_controls_are_measured(measured: Measured) -> None:
    assert [entry["target"] for entry in measured.of("plan")] == [f"{target:g}bpp" for target in TARGETS]
    assert [entry["label"] for entry in measured.of("uniform")] == ["all NVFP4", "all MXFP8"]
    assert [entry["target"] for entry in measured.of("fisher_trace")] == [f"{target:g}bpp" for target in TARGETS]
    assert [entry["target"] for entry in measured.of("mixture")] == [f"{target:g}bpp" for target in TARGETS]
    assert json.loads(measured.run.store.get("plans/measured.json")) == measured.result
    for entry in measured.result["plans"]:
        assert entry["activations"]["tokens"] == 4 * 24 == measured.result["text"]["tokens"]
        assert (entry["weights"] is None) == (entry["kind"] in ("mixture", "fisher_trace"))
    assert measured.result["calibration_tokens"] == 6 * 32


def test_the_figures_of_a_plan_are_those_of_the_repository_that_it_becomes(measured: Measured, tmp_path: Path) -> None:
    """Measured from candidates, and from what was assembled of them by a command that knows nothing of the run."""
    store = measured.config.store.model_copy(update={"output": tmp_path / "repository"})
    budget = BudgetConfig(bpp=5.5)
    again = Run(measured.config.model_copy(update={"store": store, "budget": budget}), open_workers=unopened)
    assembled(again)
    settings = measured.config.evaluation
    assert settings is not None
    found = evaluate(
        str(tmp_path / "repository"),
        measured.config.model.source,
        settings.text[0].path,
        sequences=settings.sequences,
        length=settings.length,
        overrides=["calibration.microbatch=3"],
        open_workers=in_process(),
    )
    (plan,) = [entry for entry in measured.of("plan") if entry["target"] == "5.5bpp"]
    assert to_json(found.weights) == plan["weights"]
    assert to_json(found.activations) == plan["activations"]
    assert to_json(found.source_figures) == measured.result["source"]


def test_a_quantized_output_head_is_measured_from_candidates_as_from_the_repository(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama_untied")
    head, force = "model.quantize_lm_head=true", "allocation.force=[{match: lm_head, format: MXFP8}]"
    config = configuration(tmp_path, source, head, force)
    run = Run(config, open_workers=in_process())
    run.measure()
    plan = run.measured().plan
    assert plan.choice["lm_head"] == "MXFP8"
    (entry,) = planned(run)["plans"]
    assembled(run, plan)
    settings = config.evaluation
    assert settings is not None
    found = evaluate(
        str(config.store.output),
        str(source),
        settings.text[0].path,
        sequences=settings.sequences,
        length=settings.length,
        overrides=["calibration.microbatch=3"],
        open_workers=in_process(),
    )
    assert to_json(found.weights) == entry["weights"]
    assert to_json(found.activations) == entry["activations"]


def test_predictions_are_the_prices_of_the_choice(measured: Measured) -> None:
    table = measured.run.measured().planner.table
    for entry in measured.result["plans"]:
        columns = [table.formats.index(entry["choice"][group]) for group in table.groups]
        prices = table.token_fisher[range(len(columns)), columns]
        assert entry["predicted_loss"] == pytest.approx(prices.sum())
    targets = to_json(measured.run.measured().sweep)["targets"]
    for entry, plan in zip(measured.of("plan"), targets, strict=True):
        for key in ("predicted_loss", "standard_error", "bpp", "weight_bytes", "groups", "choice"):
            assert entry[key] == pytest.approx(plan[key]) if key != "choice" else entry[key] == plan[key]


def test_controls_have_the_bytes_they_are_compared_at(measured: Measured) -> None:
    plans = {entry["target"]: entry for entry in measured.of("plan")}
    largest = int((measured.run.sizes.weights.max(axis=1) - measured.run.sizes.weights.min(axis=1)).max())
    for entry in measured.of("mixture"):
        least = plans[entry["target"]]["weight_bytes"]
        assert least <= entry["weight_bytes"] < least + largest
        assert len(set(entry["choice"].values())) <= 2
    for entry in measured.of("fisher_trace"):
        assert entry["bpp"] <= float(entry["target"].removesuffix("bpp"))
        # By its own price no plan of the same budget is better.
        trace = measured.run.measured().planner.table.fisher_trace
        own, ours = (
            sum(
                trace[row, measured.run.sizes.formats.index(each["choice"][group])]
                for row, group in enumerate(measured.run.measured().planner.table.groups)
            )
            for each in (entry, plans[entry["target"]])
        )
        assert own <= ours * (1 + 1e-9)
    for entry in measured.of("fisher_trace"):
        plan = plans[entry["target"]]
        difference = entry["activations"]["kl_mean"] - plan["activations"]["kl_mean"]
        assert entry["behind_plan"]["kl"] == pytest.approx(difference, abs=1e-12)
        assert (entry["behind_plan"]["standard_error"] == 0) == (entry["choice"] == plan["choice"])
    assert {entry["behind_plan"] for entry in (*measured.of("plan"), *measured.of("uniform"))} == {None}
    for entry in measured.of("uniform"):
        assert set(entry["choice"].values()) == {entry["label"].removeprefix("all ")}


def test_what_was_measured_is_not_measured_again(measured: Measured) -> None:
    again = Run(measured.config, open_workers=unopened)
    assert swept(again) == measured.result
    assert to_json(sweep.run(measured.config, measure=True).measured) == measured.result
    # One more plan is measured alone and joins the others, in the place of an older one for its target.
    settings = measured.config.model_copy(update={"budget": BudgetConfig(bpp=6.0)})
    other = Run(settings, open_workers=in_process())
    joined = planned(other)
    assert [entry for entry in joined["plans"] if entry["target"] != "6bpp"] == measured.result["plans"]
    assert len([entry for entry in joined["plans"] if entry["target"] == "6bpp"]) == 1
    assert planned(Run(settings, open_workers=unopened)) == joined


@pytest.mark.slow
def test_a_draft_head_is_in_no_prediction_of_the_body(tmp_path: Path) -> None:
    config = configuration(tmp_path, make_family(tmp_path / "source", "qwen3_5_moe"), "sweep=[6.0]")
    run = Run(config, open_workers=in_process())
    run.measure()
    plan, table = run.measured().plan, run.measured().planner.table
    result = planned(run)
    (entry,) = result["plans"]
    drafts = [
        row for row, group in enumerate(run.layout.groups) if run.layout.block_of[group.name].kind is BlockKind.DRAFT
    ]
    columns = [table.formats.index(plan.choice[group]) for group in table.groups]
    own = sum(table.token_fisher[row, columns[row]] for row in drafts)
    assert drafts
    assert own > 0
    assert entry["predicted_loss"] == pytest.approx(plan.predicted_loss - own)
    assert 0 <= entry["activations"]["draft_agreement"] <= 1
    assert 0 <= result["source"]["draft_agreement"] <= 1


def test_it_must_be_said_what_to_measure_on(measured: Measured) -> None:
    without = measured.config.model_copy(update={"evaluation": None})
    with pytest.raises(InputError, match="evaluation"):
        sweep.run(without, measure=True)
    settings = measured.config.evaluation
    assert settings is not None
    for update, message in (
        ({"sequences": 100_000}, "100,000 sequences"),
        ({"images": Path("captions.jsonl")}, "calibration.images"),
        ({"text": EvaluationConfig.model_validate({"text": "nowhere.txt"}).text}, "nowhere.txt"),
    ):
        wrong = measured.config.model_copy(update={"evaluation": settings.model_copy(update=update)})
        with pytest.raises(InputError, match=message):
            sweep.run(wrong, measure=True)


def test_a_damaged_candidate_is_made_again_and_changes_no_figure(measured: Measured, tmp_path: Path) -> None:
    """It is found by its digest while it is decoded, not by what it would do to the figures."""
    store = measured.config.store.model_copy(update={"run": tmp_path / "run"})
    config = measured.config.model_copy(update={"store": store, "sweep": (6.5,)})
    run = Run(config, open_workers=in_process())
    run.measure()
    victim = next(key for key in run.store.list("forward/0001") if key.endswith("/NVFP4.safetensors"))
    data = bytearray(run.store.get(victim))
    data[-1] ^= 0x11
    run.store.put(victim, bytes(data))
    result = swept(run)
    (plan,) = [entry for entry in result["plans"] if entry["kind"] == "plan"]
    (expected,) = [entry for entry in measured.of("plan") if entry["target"] == "6.5bpp"]
    assert plan == expected
    assert [event.key for event in read_events(run.store) if event.event == "repair"] == [victim]


def test_quantize_measures_what_it_ships_and_checks_the_text_first(measured: Measured, tmp_path: Path) -> None:
    settings = measured.config.evaluation
    assert settings is not None
    wrong = measured.config.model_copy(update={"evaluation": settings.model_copy(update={"sequences": 10**6})})
    with pytest.raises(InputError, match="1,000,000 sequences"):
        quantize.run(wrong)
    store = measured.config.store.model_copy(update={"output": tmp_path / "repository"})
    config = measured.config.model_copy(update={"store": store, "budget": BudgetConfig(bpp=5.5)})
    result = quantize.run(config)  # everything of this target was measured, so no worker is started
    assert result.evaluation is not None
    entry = next(each for each in result.evaluation.plans if (each.kind, each.target) == ("plan", "5.5bpp"))
    card = (tmp_path / "repository" / "README.md").read_text()
    assert f"{entry.activations.kl_mean:.4f}" in card


# Comparison -----------------------------------------------------------------------------------------------------------


def test_the_knee_says_how_much_it_depends_on_the_range() -> None:
    points = [(4.0, 1.0), (5.0, 0.3), (6.0, 0.2), (7.0, 0.12), (8.0, 0.1)]
    found = measured_knee(points)
    assert found is not None
    assert (found.bpp, found.kl, found.from_bpp, found.to_bpp) == (5.0, 0.3, 4.0, 8.0)
    assert [(each.from_bpp, each.to_bpp) for each in found.stability] == [(4.0, 7.0), (5.0, 7.0), (5.0, 8.0)]
    assert found.stability[1].bpp in (5.0, 6.0)
    assert measured_knee(points[:3]) is None
