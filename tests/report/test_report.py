"""Claims about the report's facts: they are the run's, they add up, and nothing is there that was not measured."""

from __future__ import annotations

import importlib
import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs.command_line import cli
from jobs.commands import report as command
from jobs.pipeline import stages
from jobs.pipeline.measured import Measured
from jobs.pipeline.reporting import WrittenReport, report
from jobs.pipeline.run import Run
from prismaquant_ray import formatting, records
from prismaquant_ray.allocation import frontier
from prismaquant_ray.block_records import ForwardRecord
from prismaquant_ray.config import Config, load_config
from prismaquant_ray.errors import StoreError
from prismaquant_ray.events import Event, PassBegan, RunBegan, RunEnded, StepDone
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.report import gather as gathering
from prismaquant_ray.report.arrangement import least_gained
from prismaquant_ray.report.chart import Axis, chart
from prismaquant_ray.report.findings import Findings
from prismaquant_ray.report.measurements import measured_findings, measured_of
from prismaquant_ray.report.page import LONGEST, page
from prismaquant_ray.report.plots import plots
from prismaquant_ray.report.summary import summarize_probe
from prismaquant_ray.report.timings import timings
from prismaquant_ray.serialization import to_bytes, to_json
from prismaquant_ray.storage.store import Store
from tests.inprocess import in_process, unopened
from tests.reported import (
    HOSTILE,
    add_measurements,
    divergence,
    enlarged,
    findings_of,
    measured_plan,
    measured_run,
    measurements,
    reopened,
)
from tests.runs import configuration
from tests.s3_server import S3Server
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, families: Mapping[str, Path]) -> Measured:
    """A run of a model with experts, a vision tower, a draft head and an output head."""
    directory = tmp_path_factory.mktemp("everything")
    return measured_run(directory, families["qwen3_5_moe"], "model.quantize_lm_head=true", images=2)


@pytest.fixture(scope="module")
def found(everything: Measured) -> Findings:
    """Its findings, nothing measured but the passes."""
    return findings_of(everything)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    directory = tmp_path_factory.mktemp("dense")
    return measured_run(directory, make_checkpoint(directory / "source", "llama"))


# What a run found ---------------------------------------------------------------------------------------------


def test_the_plan_of_the_budget_is_the_one_that_would_be_assembled(everything: Measured, found: Findings) -> None:
    plan = everything.plan
    letters = {entry.letter: entry.name for entry in found.formats}
    assert [letters[letter] for letter in found.plan.choice] == list(plan.choice.values())
    assert found.groups.name == list(plan.choice)
    assert found.plan.predicted_loss == plan.predicted_loss
    assert [entry.bpp for entry in found.plans] == sorted(entry.bpp for entry in found.plans)


def test_parts_of_a_plan_add_up_to_it(everything: Measured, found: Findings) -> None:
    plan, parts = found.plan, found.composition
    for rows in (parts.modules, parts.formats, [parts.all]):
        assert sum(row.bytes for row in rows) == plan.weight_bytes
        assert sum(row.parameters for row in rows) == everything.layout.parameters
        assert sum(row.groups for row in rows) == len(everything.layout.groups)
        assert math.fsum(row.cost or 0.0 for row in rows) == pytest.approx(plan.predicted_loss, rel=1e-12)
        assert math.sqrt(sum((row.standard_error or 0.0) ** 2 for row in rows)) == pytest.approx(plan.standard_error)
    assert {row.kind for row in parts.modules} == {"vision", "merger", "decoder", "draft", "head"}


def test_costs_are_those_of_the_records_and_their_parts_too(everything: Measured, found: Findings) -> None:
    """By brute force over the records; a draft head's are weighted."""
    weights = {BlockKind.DRAFT: everything.config.allocation.mtp_weight}
    for row, name in enumerate(found.groups.name):
        block = everything.layout.block_of[name]
        for format_, price in everything.backward[block.index].groups[name].items():
            weight = weights.get(block.kind, 1.0)
            factor = everything.planner.table.optimism[format_].factor
            expected = {
                "cost": price.cost + (factor - 1) * price.weight_cost,
                "standard_error": price.standard_error,
                "weight_cost": factor * price.weight_cost,
                "activation_cost": price.activation_cost,
            }
            for key, value in expected.items():
                assert getattr(found.groups, key)[format_][row] == pytest.approx(weight * value, rel=1e-12)
    all_ = found.composition.all
    assert all_.cost is not None
    assert all_.cost > 0
    assert all_.weight_cost is not None
    assert all_.activation_cost is not None
    assert all_.cross_cost is not None
    assert all_.weight_cost + all_.activation_cost + all_.cross_cost == pytest.approx(all_.cost, rel=1e-9)


def test_one_format_everywhere_costs_the_sum_of_its_column(everything: Measured, found: Findings) -> None:
    table, sizes = everything.planner.table, everything.sizes
    for entry in found.uniform:
        column = table.formats.index(FormatName(entry.format))
        assert entry.predicted_loss == pytest.approx(float(table.token_fisher[:, column].sum()))
        assert entry.weight_bytes == int(sizes.weights[:, column].sum())
        spread = float(np.sqrt(np.square(table.standard_error[:, column]).sum()))
        assert entry.standard_error == pytest.approx(spread)
    cost = {**found.groups.cost, "NVFP4": [None, *found.groups.cost["NVFP4"][1:]]}
    entries = gathering.uniform(replace(found.groups, cost=cost), found.formats, everything.planner, None)
    assert {entry.format: entry for entry in entries}["NVFP4"].predicted_loss is None


def test_rounding_gains_are_ratios_of_held_out_errors(everything: Measured, found: Findings) -> None:
    shipped: dict[str, list[float]] = {}
    by_name = {(entry.linear, entry.codec): entry for entry in found.rounding.linears}
    for record in everything.forward.values():
        for linear, codecs in record.linears.items():
            for codec, figures in codecs.items():
                entry = by_name.pop((linear, codec))
                methods, errors = figures.method, figures.holdout_error
                if isinstance(methods, str):
                    ratios = [errors[methods] / errors["nearest"]]
                    assert entry.experts is None
                    assert entry.won == {methods: 1}
                else:
                    nearest = errors["nearest"]
                    ratios = [errors[m][e] / nearest[e] for e, m in enumerate(methods) if nearest[e] > 0]
                    assert entry.experts == len(methods)
                    assert entry.won == Counter(methods)
                    assert entry.judged == len(ratios)
                assert entry.shipped == pytest.approx(statistics.median(ratios))
                assert all(ratio <= 1 + 1e-12 for ratio in ratios), "the best of all ways ships"
                shipped.setdefault(codec, []).extend(ratios)
    assert not by_name
    for codec, ratios in shipped.items():
        summary = found.rounding.codecs[codec]
        assert summary.shipped == pytest.approx(statistics.geometric_mean(ratios))
        assert sum(summary.won.values()) == summary.matrices >= len(ratios)


def test_experts_are_counted_as_recorded(everything: Measured, found: Findings) -> None:
    recorded = {name: tokens for record in everything.forward.values() for name, tokens in record.experts.items()}
    assert {entry.group: entry.tokens for entry in found.experts} == recorded
    assert recorded
    for entry in found.experts:
        even = sum(entry.tokens) / len(entry.tokens)
        assert entry.unseen == entry.tokens.count(0)
        assert entry.cold == sum(0 < count < 0.1 * even for count in entry.tokens)
        assert (entry.fewest, entry.most) == (min(entry.tokens), max(entry.tokens))


def test_cold_experts_are_told_from_unseen_ones(everything: Measured) -> None:
    blocks = everything.layout.blocks
    forward = {block.index: ForwardRecord(linears={}, experts={}) for block in blocks}
    forward[blocks[2].index] = ForwardRecord(linears={}, experts={"a": [0, 9, 10, 381], "b": [0, 0, 0, 0]})
    a, b = gathering.expert_findings(replace(everything.data, forward=forward))
    assert (a.even, a.unseen, a.cold, a.median) == (100, 1, 1, 9.5)
    assert (b.unseen, b.cold, b.most) == (4, 0, 0)


def test_the_draft_head_is_shown_as_measured(everything: Measured, found: Findings) -> None:
    (block,) = everything.layout.of(BlockKind.DRAFT)
    recorded = everything.backward[block.index]
    assert found.draft is not None
    assert found.draft.agreement == recorded.agreement
    assert recorded.agreement is not None
    assert set(recorded.agreement) == {"NVFP4", "MXFP8", "BF16"}
    assert found.draft.tokens == recorded.tokens
    costs = [price[FormatName.NVFP4].cost for price in recorded.groups.values()]
    assert found.draft.predicted_loss["NVFP4"] == pytest.approx(0.1 * math.fsum(costs))


def test_every_format_has_a_letter_and_a_colour_of_its_own() -> None:
    assert len({format_.letter for format_ in FORMATS.values()}) == len(FORMATS)
    assert len({format_.colours[0] for format_ in FORMATS.values()}) == len(FORMATS)


def test_timings_are_those_of_the_steps() -> None:
    def began(at: float, stage: str) -> PassBegan:
        return PassBegan(at=at, stage=stage, shards=2, units=4, produced=4, microbatches=1, steps=4)

    def step(at: float, worker: str, shard: str, started: float, seconds: float, **more: Any) -> StepDone:
        return StepDone(
            at=at, stage="forward", shard=shard, units=2, microbatch=0, worker=worker, started=started,
            seconds=seconds, peak_bytes=7, **more,
        )  # fmt: skip

    events: list[Event] = [
        RunBegan(at=99.0, workers=2),
        began(100.0, "forward"),
        step(103.0, "a", "0000-0001", 101.0, 2.0, tokens=10, hop_bytes=5),
        step(106.0, "b", "0002-0003", 103.0, 3.0, tokens=10, hop_bytes=6),
        step(109.0, "a", "0000-0001", 107.0, 2.0, read_bytes=8, written_bytes=9),
        RunEnded(at=110.0, how="measured"),
        # A pass that began and was stopped before anything was done has nothing to show.
        RunBegan(at=200.0, workers=2),
        began(201.0, "backward"),
    ]
    found = timings(events, planning_seconds=0.5)
    assert (found.attempts, found.planning_seconds) == (2, 0.5)
    (only,) = found.passes
    assert (only.seconds, only.token_blocks_per_second) == (10.0, 4.0)
    assert (only.hop_bytes, only.read_bytes, only.written_bytes) == (11, 8, 9)
    a, b = only.workers
    assert (a.worker, a.steps, a.seconds, a.spans) == ("a", 2, 4.0, [("0000-0001", 1.0, 9.0)])
    assert (b.worker, b.steps, b.seconds, b.spans) == ("b", 1, 3.0, [("0002-0003", 3.0, 6.0)])


# Gathered once ------------------------------------------------------------------------------------------------


def test_one_gathering_and_one_sweep_give_every_figure_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the summary, the card, the page and the JSON; `quantize` solves the sweep once, and `report` once more."""
    calls: Counter[str] = Counter()
    taken: list[Findings] = []

    def gather(*arguments: Any, **more: Any) -> Findings:
        calls["gather"] += 1
        taken.append(gathering.gather(*arguments, **more))
        return taken[-1]

    def sweep(*arguments: Any, **more: Any) -> Any:
        calls["sweep"] += 1
        return frontier.sweep(*arguments, **more)

    monkeypatch.setattr("jobs.pipeline.measured.gather", gather)
    monkeypatch.setattr("prismaquant_ray.allocation.plans.sweep", sweep)
    config = configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"), sweep=(5.0, 6.0, 7.0))
    done = stages.quantize(config, open_workers=in_process())
    assert calls == {"gather": 1, "sweep": 1}
    (findings,) = taken
    uniform = {entry.format: entry.predicted_loss for entry in findings.uniform}
    assert done.probe.uniform_loss == uniform
    for name, gain in findings.rounding.codecs.items():
        assert done.probe.holdout_error_to_nearest[name] == gain.shipped
        assert done.probe.methods[name] == gain.won
    text = (config.store.output / "README.md").read_text()
    loss, error = findings.composition.all.cost, findings.composition.all.standard_error
    assert f"{loss:.5f} ± {error:.5f} nats per token" in text
    assert all(
        f" {plan.predicted_loss:.5f} " in text or f"**{plan.predicted_loss:.5f}**" in text for plan in findings.plans
    )
    assert f"predicted loss {formatting.with_error(loss, error)}" in page(findings)
    assert [plan.target for plan in done.sweep.targets] == [plan.target for plan in findings.plans]


@pytest.mark.parametrize("name", ["report", "assemble", "sweep"])
def test_a_command_solves_the_sweep_once(
    dense: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    solved = []

    def sweep(*arguments: Any, **more: Any) -> Any:
        solved.append(arguments)
        return frontier.sweep(*arguments, **more)

    monkeypatch.setattr("prismaquant_ray.allocation.plans.sweep", sweep)
    store = dense.config.store.model_copy(update={"output": tmp_path / "repository"})
    importlib.import_module(f"jobs.commands.{name}").run(dense.config.model_copy(update={"store": store}))
    assert len(solved) == 1


def test_the_summary_prices_the_loss_whatever_a_plan_minimises(dense: Measured) -> None:
    allocation = dense.config.allocation.model_copy(update={"objective": "fisher_trace"})
    other = reopened(dense.config.model_copy(update={"allocation": allocation}))
    assert summarize_probe(other.data) == summarize_probe(dense.data)


def test_without_a_target_within_reach_there_is_still_a_report(dense: Measured) -> None:
    found = findings_of(reopened(dense.config.model_copy(update={"sweep": (20.0, 1.0)})))
    assert [plan.target for plan in found.plans] == ["6.25bpp"]
    assert (found.out_of_reach, found.knee) == ([1.0, 20.0], None)
    assert "No plan exists for 1, 20 bits" in _text(page(found))


# What was measured of plans -------------------------------------------------------------------------------------


def test_without_measurements_every_place_says_so(dense: Measured) -> None:
    found = findings_of(dense)
    assert found.measured is None
    assert all(entry.measured is None for entry in (*found.plans, *found.uniform))
    text = _text(page(found))
    assert "not measured: run sweep --measure" in text
    # Both KL columns of every plan, and of one format everywhere but for BF16.
    rows = len(found.plans) + len(found.uniform) - 1
    assert text.count("not measured") >= 2 * rows + 2
    assert "nan" not in text.lower().split()


def test_measurements_belong_to_exactly_the_plans_that_were_measured(dense: Measured) -> None:
    body = add_measurements(dense)
    try:
        found = findings_of(dense)
        assert found.measured is not None
        assert found.measured.stale == []
        figures = {plan.target: plan for plan in body.plans if plan.kind == "plan"}
        for plan in found.plans:
            expected = figures.get(plan.target)
            assert (plan.measured is None) == (expected is None)
            if expected is not None:
                assert plan.measured is not None
                assert plan.measured.activations == expected.activations
        assert {entry.kind for entry in found.measured.others} == {"mixture"}
        uniform = {entry.format: entry.measured for entry in found.uniform}
        assert uniform["NVFP4"] is not None
        assert uniform["NVFP4"].activations == divergence(0.2)
        assert uniform["BF16"] is None
        text = _text(page(found))
        assert formatting.with_error(0.2, 0.004) in text

        changed = reopened(dense.config.model_copy(update={"sweep": (4.6, 5.0, 6.1)}))
        again = findings_of(changed)
        assert again.measured is not None
        there = {plan.target: plan.measured is not None for plan in again.plans}
        assert there == {"4.6bpp": False, "5bpp": True, "6.1bpp": False, "6.25bpp": False}
        assert set(again.measured.stale) == set(figures) - {"5bpp"}
        assert "are of other plans than these" in _text(page(again))
    finally:
        dense.store.delete([records.MEASURED_PLANS])


def test_a_plan_takes_a_measurement_of_its_own_choice_only(dense: Measured) -> None:
    low, middle, *_, high = dense.sweep.targets
    assert low.choice != middle.choice != high.choice
    body = measurements(
        [
            measured_plan(low, label="ours", weights=None),
            measured_plan(low, kind="mixture", label="mixed", choice=middle.choice),
            measured_plan(low, label="another", choice=high.choice),
            measured_plan(low, label="gone", target="9bpp", choice=high.choice),
        ]
    )
    found = measured_findings(body, {low.target: low.choice}, ["NVFP4"])
    assert found is not None
    assert [entry.label for entry in found.others] == ["mixed"]
    assert found.stale == ["another", "gone"]
    ours = measured_of(body, low)
    assert ours is not None
    assert (ours.weights, ours.activations) == (None, divergence(0.1))
    other = replace(low, choice={**low.choice, dense.layout.groups[0].name: FormatName.BF16})
    assert measured_of(body, other) is None
    assert measured_of(body, replace(low, target="1000B")) is None


@pytest.mark.parametrize("body", [b"{", b'{"plans": []}', to_bytes(measurements([], run="another"))])
def test_measurements_that_are_none_are_refused(dense: Measured, body: bytes) -> None:
    dense.store.put(records.MEASURED_PLANS, body)
    try:
        with pytest.raises(StoreError, match=r"plans/measured\.json .*run sweep --measure again"):
            findings_of(dense)
    finally:
        dense.store.delete([records.MEASURED_PLANS])


# What is written ------------------------------------------------------------------------------------------------


def run_of(known: Measured | Config) -> Run:
    return Run(known.config if isinstance(known, Measured) else known, open_workers=unopened)


@pytest.mark.slow
def test_the_report_goes_into_the_run_store_or_where_it_is_told(dense: Measured, tmp_path: Path) -> None:
    for out, place in ((None, dense.config.store.run / "report"), (str(tmp_path / "there"), tmp_path / "there")):
        result = report(run_of(dense), out=out)
        names = {Path(path).name for path in result.files}
        assert {"report.html", "report.json", "frontier.png", "format_map.png", "sensitivity.png"} <= names
        assert {path.name for path in place.iterdir()} == names
        assert all((place / name).read_bytes().startswith(PNG) for name in names if name.endswith(".png"))
        body = json.loads((place / "report.json").read_text())
        assert body["schema"] == 3
        assert Path(result.report) == place / "report.html"


def test_without_matplotlib_there_is_a_page_and_a_word_about_the_plots(
    dense: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec
    with monkeypatch.context() as without:
        without.setattr("jobs.pipeline.reporting.find_spec", lambda name: None if name == "matplotlib" else find(name))
        result = report(run_of(dense), out=str(tmp_path / "there"))
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"report.html", "report.json"}
    said = shown_by(result)
    assert [line for line in said if "PNG" in line] == [
        "no PNGs: they need matplotlib, which pip install 'prismaquant-ray[plots]' brings"
    ]
    assert not any("PNG" in line for line in shown_by(report(run_of(dense), out=str(tmp_path / "other"))))


def shown_by(result: WrittenReport) -> list[str]:
    """What the terminal shows."""
    console = Console(record=True, width=200, file=io.StringIO())
    command.render(result, console)
    return console.export_text().splitlines()


@pytest.mark.s3
def test_the_report_may_go_into_a_bucket(dense: Measured, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.make_bucket("reports")
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    result = report(run_of(dense), out="s3://reports/deep")
    assert result.report == "s3://reports/deep/report.html"
    store = Store("s3://reports/deep")
    assert {f"s3://reports/deep/{key}" for key in store.list()} == set(result.files)
    assert json.loads(store.get("report.json"))["schema"] == 3


def test_a_report_that_has_no_place_is_refused_in_one_line(dense: Measured, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    config = dense.config.store.run.parent / "config.yaml"
    result = CliRunner().invoke(cli, ["report", str(config), "--out", str(tmp_path / "file")])
    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_every_key_of_the_json_is_documented(found: Findings) -> None:
    documented, body = (ROOT / "docs/report.md").read_text(), to_json(found)
    assert [key for key in body if f"`{key}`" not in documented] == []
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert body["settings"]["calibration"]["sequences"] == 6
    versions = {"prismaquant_ray", "torch", "transformers", "compressed-tensors", "ray", "python"}
    assert all(body["versions"][name] for name in versions)
    assert body["calibration"]["fingerprint"]["calibration.sequences"] == 6
    assert body["calibration"]["digest"]


def test_a_row_of_the_json_begins_with_what_it_is_of(found: Findings) -> None:
    body = to_json(found)
    assert list(body["composition"]["modules"][0])[:4] == ["kind", "module", "label", "groups"]
    assert list(body["composition"]["formats"][0])[:2] == ["format", "groups"]
    assert list(body["rounding"]["linears"][0])[:5] == ["linear", "block", "module", "codec", "experts"]
    assert list(body["rounding"]["codecs"]["nvfp4"])[:3] == ["formats", "matrices", "ratio"]


@pytest.mark.slow
def test_plots_show_what_the_run_has(found: Findings, dense: Measured) -> None:
    with_experts = plots(found)
    assert set(with_experts) >= {"experts", "cost_split", "rounding", "most_sensitive"}
    plain = plots(findings_of(dense))
    assert "experts" not in plain
    assert all(data.startswith(PNG) for data in (*with_experts.values(), *plain.values()))


def test_names_that_mean_harm_are_text(dense: Measured) -> None:
    large = enlarged(findings_of(dense), 2)
    html = page(large)
    assert HOSTILE in _text(html)
    assert "<img" not in html
    assert html.count("</script>") == 2
    plots(large)


@pytest.mark.parametrize("layers", [64, 126])
def test_a_large_model_has_a_page_below_a_megabyte(dense: Measured, layers: int) -> None:
    found = findings_of(dense)
    html = page(enlarged(found, layers))
    assert len(found.plans) >= 8
    assert len(html.encode()) < 1e6
    assert html.count('class="cell ') == 4 * layers


def test_a_page_is_cut_where_tables_are_long_and_says_so(dense: Measured) -> None:
    large = enlarged(findings_of(dense), 2000)
    # A run that was stopped and went on many times.
    large = replace(large, timings=replace(large.timings, passes=large.timings.passes * 600))
    workers = sum(len(entry.workers) for entry in large.timings.passes)
    assert workers > LONGEST
    html = page(large)
    assert len(html.encode()) < 5e6
    linears = len(large.rounding.linears)
    for rows, key in ((8000, "groups"), (linears, "rounding.linears"), (workers, "timings.passes")):
        assert f"This table has 1,000 of {rows:,} rows; all of them are in report.json, under {key}." in _text(html)
    for table in ("all-groups", "linears", "workers"):
        body = html.partition(f'id="{table}"')[2].partition("<tbody>")[2].partition("</tbody>")[0]
        assert body.count("<tr") == LONGEST
    assert len(large.groups.name) == 8000
    # Of Linears those with the most of round-to-nearest's error left.
    shown, ratios = least_gained(large, 10), sorted(entry.shipped or 0.0 for entry in large.rounding.linears)
    assert sorted(entry.shipped or 0.0 for entry in shown) == ratios[-10:]
    assert "This table has" not in _text(page(enlarged(findings_of(dense), 64)))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("allocation.limits.prefill=1.5",), "The knee of the predicted frontier"),
        (("budget={vram: 1MB, context: 64}",), "Memory of a server with 1 × 64 tokens"),
        (("budget.bytes=280kB",), "280.0\u00a0kB"),
        (("sweep=[6.25]",), "The frontier has no knee"),
        (("sweep=[3, 6, 17]",), "No plan exists for 3, 17 bits per parameter"),
    ],
)
def test_every_kind_of_plan_is_shown(dense: Measured, overrides: tuple[str, ...], says: str) -> None:
    config = load_config(dense.config.store.run.parent / "config.yaml", overrides[-1:])
    found = findings_of(reopened(config))
    assert says in _text(page(found))
    assert len(found.frontier.bpp) >= 2
    assert found.plan.target == config.budget.target
    json.dumps(to_json(found), allow_nan=False)


def test_another_objective_has_no_standard_errors_and_no_split(dense: Measured) -> None:
    allocation = dense.config.allocation.model_copy(update={"objective": "fisher_trace"})
    found = findings_of(reopened(dense.config.model_copy(update={"allocation": allocation})))
    assert all(plan.standard_error is None for plan in found.plans)
    assert found.composition.all.cross_cost is None
    assert "the objective fisher_trace has no such parts" in _text(page(found))


# Figures and axes -----------------------------------------------------------------------------------------------


@given(st.floats(1e-4, 1e6), st.integers(2, 6))
def test_a_figure_is_what_it_shows(value: float, digits: int) -> None:
    text = formatting.figure(value, digits)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.5001 * 10.0 ** (1 - digits))


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 10.0))
def test_an_error_says_how_many_digits_count(value: float, error: float) -> None:
    text, _, spread = formatting.with_error(value, error).replace(",", "").replace("−", "-").partition(" ± ")
    assert float(spread) == pytest.approx(error, rel=0.15)
    assert abs(float(text) - value) <= 0.16 * error
    assert len(text.partition(".")[2]) == len(spread.partition(".")[2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.with_error(0.11223, 0.00072), "0.1122 ± 0.0007"),
        (formatting.with_error(0.2246, 0.0016), "0.2246 ± 0.0016"),
        (formatting.with_error(0.25, None), "0.2500"),
        (formatting.with_error(None, None), "–"),
        (formatting.figure(-0.00071, 2), "−0.00071"),
        (formatting.size(133_487_639), "133.5\u00a0MB"),
        (formatting.size(1_340_000_000), "1.34\u00a0GB"),
        (formatting.size(0), "0\u00a0B"),
        (formatting.shrunk(269.0e6, 133.5e6), "269.0 → 133.5\u00a0MB"),
        (formatting.shrunk(16.4e9, 880e6), "16.4\u00a0GB → 880.0\u00a0MB"),
        (formatting.amount(106_168_320), "106.2\u00a0M"),
        (formatting.seconds(226), "3 min 46 s"),
        (formatting.seconds(7384), "2 h 03 min"),
        (formatting.seconds(0.065), "65 ms"),
        (formatting.target("5.5bpp"), "5.5\u00a0bpp"),
        (formatting.target("19000000000B"), "19.0\u00a0GB"),
        (formatting.target("24000000000B-vram-2x32768"), "24.0\u00a0GB of VRAM (2 x 32768 tokens)"),
        (formatting.change(-0.5), "−50.0\u00a0%"),
    ],
)
def test_figures_read_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


@given(st.floats(1e-6, 1e3), st.floats(1.05, 1e4), st.booleans())
def test_ticks_are_round_rising_and_on_the_axis(low: float, ratio: float, log: bool) -> None:
    axis = Axis(low=low, high=low * ratio, log=log)
    ticks = axis.ticks()
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 11
    places = [axis.place(tick) for tick in ticks]
    assert all(place is not None and -1e-6 <= place <= 100 + 1e-6 for place in places)
    if not log:
        assert len(ticks) >= 2


def test_marks_stand_where_their_figures_are(found: Findings) -> None:
    drawn = chart(found)
    for point in drawn.points:
        style = dict(entry.split(":") for entry in drawn.style(point).split(";"))
        x = drawn.x.low + (drawn.x.high - drawn.x.low) * float(style["--x"][:-1]) / 100
        y = drawn.linear.high * (1 - float(style["--y"][:-1]) / 100)
        assert x == pytest.approx(point.bpp, abs=1e-3 * (drawn.x.high - drawn.x.low))
        assert y == pytest.approx(point.loss, abs=1e-3 * drawn.linear.high)
    assert {point.series for point in drawn.points} == {"plan", "budget", "knee", "uniform"}
    assert len(drawn.line) >= 3


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.skipped = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.skipped = False

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data)


def _text(html: str) -> str:
    parser = _Text()
    parser.feed(html)
    return "".join(parser.parts)
