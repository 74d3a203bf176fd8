"""Claims about the report's facts: they are the run's, they add up, and nothing is there that was not measured."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from actors.events import Event
from actors.schedule.units import Stage
from jobs import planning, report
from jobs.__main__ import cli
from jobs.run import Run
from prismaquant_ray import formatting
from prismaquant_ray.config import load
from prismaquant_ray.errors import StoreError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.report import facts, measured
from prismaquant_ray.report.chart import Axis, chart
from prismaquant_ray.report.page import page
from prismaquant_ray.report.plots import plots
from prismaquant_ray.storage.store import Store
from tests.reported import HOSTILE, add_measurements, enlarged, measured_run, reopened
from tests.s3_server import S3Server
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, families: Mapping[str, Path]) -> Run:
    """A run of a model with experts, a vision tower, a draft head and an output head."""
    directory = tmp_path_factory.mktemp("everything")
    return measured_run(directory, families["qwen3_5_moe"], "model.quantize_lm_head=true", images=2)


@pytest.fixture(scope="module")
def found(everything: Run) -> dict[str, Any]:
    """Its report, nothing measured but the passes."""
    return report.gather(everything)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("dense")
    return measured_run(directory, make_checkpoint(directory / "source", "llama"))


# What a run found ---------------------------------------------------------------------------------------------


def test_the_plan_of_the_budget_is_the_one_that_would_be_assembled(everything: Run, found: dict[str, Any]) -> None:
    plan = planning.allocate(everything)
    letters = {entry["letter"]: entry["name"] for entry in found["formats"]}
    shown_plan = found["plans"][found["budget"]]
    assert [letters[letter] for letter in shown_plan["choice"]] == list(plan["choice"].values())
    assert found["groups"]["name"] == list(plan["choice"])
    assert shown_plan["predicted_loss"] == plan["predicted_loss"]
    assert [entry["bpp"] for entry in found["plans"]] == sorted(entry["bpp"] for entry in found["plans"])


def test_parts_of_a_plan_add_up_to_it(everything: Run, found: dict[str, Any]) -> None:
    plan, parts = found["plans"][found["budget"]], found["composition"]
    for rows in (parts["modules"], parts["formats"], [parts["all"]]):
        assert sum(row["bytes"] for row in rows) == plan["weight_bytes"]
        assert sum(row["parameters"] for row in rows) == everything.layout.parameters
        assert sum(row["groups"] for row in rows) == len(everything.layout.groups)
        assert math.fsum(row["cost"] for row in rows) == pytest.approx(plan["predicted_loss"], rel=1e-12)
        assert math.sqrt(sum(row["standard_error"] ** 2 for row in rows)) == pytest.approx(plan["standard_error"])
    kinds = {row["kind"] for row in parts["modules"]}
    assert kinds == {"vision", "merger", "decoder", "draft", "head"}


def test_costs_are_those_of_the_records_and_their_parts_too(everything: Run, found: dict[str, Any]) -> None:
    """By brute force over the records; a draft head's are weighted."""
    groups = found["groups"]
    weights = {"draft": everything.config.allocation.mtp_weight}
    for row, name in enumerate(groups["name"]):
        block = everything.layout.block_of[name]
        record = everything.records[Stage.BACKWARD][block.index].metrics["groups"][name]
        for format_, price in record.items():
            weight = weights.get(str(block.kind), 1.0)
            for key in ("cost", "standard_error", "weight_cost", "activation_cost"):
                assert groups[key][format_][row] == pytest.approx(weight * price[key], rel=1e-12)
    everything_ = found["composition"]["all"]
    split = everything_["weight_cost"] + everything_["activation_cost"] + everything_["cross_cost"]
    assert split == pytest.approx(everything_["cost"], rel=1e-9)


def test_parts_of_a_cost_that_records_lack_are_not_filled_in(everything: Run) -> None:
    backward = {
        index: {
            **record.metrics,
            "groups": {
                group: {
                    name: {key: value for key, value in price.items() if not key.endswith("_cost")}
                    for name, price in prices.items()
                }
                for group, prices in record.metrics["groups"].items()
            },
        }
        for index, record in everything.records[Stage.BACKWARD].items()
    }
    columns = facts.groups_of(
        everything.layout,
        everything.table,
        everything.sizes,
        backward,
        objective="token_fisher",
        draft_weight=0.1,
    )
    formats = facts.formats_of(everything.config.formats)
    blocks = facts.blocks_of(everything.layout)
    all_ = facts.composition(columns, blocks, formats, "N" * len(columns["name"]))["all"]
    assert (all_["weight_cost"], all_["activation_cost"], all_["cross_cost"]) == (None, None, None)
    assert all_["cost"] > 0
    assert facts.composition(columns, blocks, formats, "B" * len(columns["name"]))["all"]["cross_cost"] == 0


def test_one_format_everywhere_costs_the_sum_of_its_column(everything: Run, found: dict[str, Any]) -> None:
    table, sizes = everything.table, everything.sizes
    for entry in found["uniform"]:
        column = table.formats.index(FormatName(entry["format"]))
        assert entry["predicted_loss"] == pytest.approx(float(table.token_fisher[:, column].sum()))
        assert entry["weight_bytes"] == int(sizes.weights[:, column].sum())
        spread = float(np.sqrt(np.square(table.standard_error[:, column]).sum()))
        assert entry["standard_error"] == pytest.approx(spread)
    groups = {**found["groups"], "cost": {**found["groups"]["cost"]}}
    groups["cost"]["NVFP4"] = [None, *groups["cost"]["NVFP4"][1:]]
    impossible = {entry["format"]: entry for entry in facts.uniform_of(groups, found["formats"], sizes)}["NVFP4"]
    assert impossible["predicted_loss"] is None


def test_rounding_gains_are_ratios_of_held_out_errors(everything: Run, found: dict[str, Any]) -> None:
    shipped: dict[str, list[float]] = {}
    by_name = {(entry["linear"], entry["codec"]): entry for entry in found["rounding"]["linears"]}
    for record in everything.records[Stage.FORWARD].values():
        for linear, codecs in record.metrics["linears"].items():
            for codec, figures in codecs.items():
                entry = by_name.pop((linear, codec))
                methods, errors = figures["method"], figures["holdout_error"]
                if isinstance(methods, str):
                    ratios = [errors[methods] / errors["nearest"]]
                    assert entry["experts"] is None
                    assert entry["won"] == {methods: 1}
                else:
                    nearest = errors["nearest"]
                    ratios = [errors[m][e] / nearest[e] for e, m in enumerate(methods) if nearest[e] > 0]
                    assert entry["experts"] == len(methods)
                    assert entry["won"] == Counter(methods)
                    assert entry["judged"] == len(ratios)
                assert entry["shipped"] == pytest.approx(statistics.median(ratios))
                assert all(ratio <= 1 + 1e-12 for ratio in ratios), "the best of all ways ships"
                shipped.setdefault(codec, []).extend(ratios)
    assert not by_name
    for codec, ratios in shipped.items():
        summary = found["rounding"]["codecs"][codec]
        assert summary["shipped"] == pytest.approx(statistics.geometric_mean(ratios))
        assert sum(summary["won"].values()) == summary["matrices"] >= len(ratios)


def test_experts_are_counted_as_recorded(everything: Run, found: dict[str, Any]) -> None:
    recorded = {
        name: tokens
        for record in everything.records[Stage.FORWARD].values()
        for name, tokens in record.metrics["experts"].items()
    }
    assert {entry["group"]: entry["tokens"] for entry in found["experts"]} == recorded
    assert recorded
    for entry in found["experts"]:
        even = sum(entry["tokens"]) / len(entry["tokens"])
        assert entry["unseen"] == entry["tokens"].count(0)
        assert entry["cold"] == sum(0 < count < 0.1 * even for count in entry["tokens"])
        assert (entry["fewest"], entry["most"]) == (min(entry["tokens"]), max(entry["tokens"]))


def test_cold_experts_are_told_from_unseen_ones(everything: Run) -> None:
    blocks = everything.layout.blocks
    forward: dict[int, dict[str, Any]] = {block.index: {"experts": {}} for block in blocks}
    forward[blocks[2].index]["experts"] = {"a": [0, 9, 10, 381], "b": [0, 0, 0, 0]}
    a, b = facts.experts_of(everything.layout, forward)
    assert (a["even"], a["unseen"], a["cold"], a["median"]) == (100, 1, 1, 9.5)
    assert (b["unseen"], b["cold"], b["most"]) == (4, 0, 0)


def test_the_draft_head_is_shown_as_measured(everything: Run, found: dict[str, Any]) -> None:
    (block,) = everything.layout.of("draft")  # type: ignore[arg-type]
    recorded = everything.records[Stage.BACKWARD][block.index].metrics
    assert found["draft"]["agreement"] == recorded["agreement"]
    assert set(recorded["agreement"]) == {"NVFP4", "MXFP8", "BF16"}
    assert found["draft"]["tokens"] == recorded["tokens"]
    costs = [price["NVFP4"]["cost"] for price in recorded["groups"].values()]
    assert found["draft"]["predicted_loss"]["NVFP4"] == pytest.approx(0.1 * math.fsum(costs))


def test_every_format_has_a_letter_and_a_colour_of_its_own() -> None:
    from prismaquant_ray.report.page import COLOURS

    assert set(facts.LETTERS) == set(FORMATS)
    assert len(set(facts.LETTERS.values())) == len(FORMATS)
    assert set(COLOURS) == {str(name) for name in FORMATS}
    assert len({fill for fill, _ in COLOURS.values()}) == len(FORMATS)


def test_timings_are_those_of_the_steps() -> None:
    def step(at: float, worker: str, shard: str, started: float, seconds: float, **more: Any) -> Event:
        body = {"worker": worker, "shard": shard, "started": started, "seconds": seconds, "units": 2, "peak_bytes": 7}
        return Event(kind="step", at=at, payload={**body, "stage": "forward", "microbatch": 0, **more})

    events = [
        Event(kind="begin", at=99.0),
        Event(kind="pass", at=100.0, payload={"stage": "forward", "units": 4}),
        step(103.0, "a", "0000-0001", 101.0, 2.0, tokens=10, hop_bytes=5),
        step(106.0, "b", "0002-0003", 103.0, 3.0, tokens=10, hop_bytes=6),
        step(109.0, "a", "0000-0001", 107.0, 2.0, read_bytes=8, written_bytes=9),
        Event(kind="end", at=110.0),
        # A pass that began and was stopped before anything was done has nothing to show.
        Event(kind="begin", at=200.0),
        Event(kind="pass", at=201.0, payload={"stage": "backward", "units": 4}),
    ]
    found = report.timings(events)
    assert found["attempts"] == 2
    (only,) = found["passes"]
    assert (only["seconds"], only["token_blocks_per_second"]) == (10.0, 4.0)
    assert (only["hop_bytes"], only["read_bytes"], only["written_bytes"]) == (11, 8, 9)
    a, b = only["workers"]
    assert (a["worker"], a["steps"], a["seconds"], a["spans"]) == ("a", 2, 4.0, [["0000-0001", 1.0, 9.0]])
    assert (b["worker"], b["steps"], b["seconds"], b["spans"]) == ("b", 1, 3.0, [["0002-0003", 3.0, 6.0]])


# What was measured of plans -------------------------------------------------------------------------------------


def test_without_measurements_every_place_says_so(dense: Run) -> None:
    found = report.gather(dense)
    assert found["measured"] is None
    assert all(entry["measured"] is None for entry in (*found["plans"], *found["uniform"]))
    text = _text(page(found))
    assert "not measured: run sweep --measure" in text
    # Both KL columns of every plan, and of one format everywhere but for BF16.
    rows = len(found["plans"]) + len(found["uniform"]) - 1
    assert text.count("not measured") >= 2 * rows + 2
    assert "nan" not in text.lower().split()


def test_measurements_belong_to_exactly_the_plans_that_were_measured(dense: Run) -> None:
    body = add_measurements(dense)
    try:
        found = report.gather(dense)
        assert found["measured"]["stale"] == []
        figures = {plan["target"]: plan for plan in body["plans"] if plan["kind"] == "plan"}
        for plan in found["plans"]:
            expected = figures.get(plan["target"])
            assert (plan["measured"] is None) == (expected is None)
            if expected is not None:
                assert plan["measured"]["activations"] == expected["activations"]
        assert {entry["kind"] for entry in found["measured"]["others"]} == {"mixture"}
        uniform = {entry["format"]: entry["measured"] for entry in found["uniform"]}
        assert uniform["NVFP4"]["activations"]["kl_mean"] == 0.2
        assert uniform["BF16"] is None
        text = _text(page(found))
        assert formatting.with_error(0.2, 0.004) in text

        changed = reopened(dense.config.model_copy(update={"sweep": (4.6, 5.0, 6.1)}))
        again = report.gather(changed)
        there = {plan["target"]: plan["measured"] is not None for plan in again["plans"]}
        assert there == {"4.6bpp": False, "5bpp": True, "6.1bpp": False, "6.25bpp": False}
        assert set(again["measured"]["stale"]) == set(figures) - {"5bpp"}
        assert "are of other plans than these" in _text(page(again))
    finally:
        dense.store.delete(["plans/measured.json"])


def test_a_plan_takes_a_measurement_of_its_own_choice_only() -> None:
    def plans() -> list[dict[str, Any]]:
        return [{"target": "5bpp"}]

    choices = {"5bpp": {"a": "NVFP4"}}
    entries = [
        {"target": "5bpp", "kind": "plan", "label": "ours", "choice": {"a": "NVFP4"}, "weights": None},
        {"target": "5bpp", "kind": "mixture", "label": "mixed", "choice": {"a": "MXFP8"}, "weights": {"kl_mean": 1}},
        {"target": "5bpp", "kind": "plan", "label": "another", "choice": {"a": "BF16"}, "weights": None},
        {"target": "9bpp", "kind": "plan", "label": "gone", "choice": {"a": "BF16"}, "weights": None},
    ]
    ours = plans()
    found = measured.join(ours, [], {"text": {}, "source": {}, "plans": entries}, choices)
    assert found is not None
    assert ours[0]["measured"] == {"weights": None, "activations": None}
    assert [entry["label"] for entry in found["others"]] == ["mixed"]
    assert found["stale"] == ["another", "gone"]


@pytest.mark.parametrize("body", [b"{", b'{"plans": []}'])
def test_measurements_that_are_none_are_refused(dense: Run, body: bytes) -> None:
    dense.store.put("plans/measured.json", body)
    try:
        with pytest.raises(StoreError, match=r"plans/measured\.json .*run sweep --measure again"):
            report.gather(dense)
    finally:
        dense.store.delete(["plans/measured.json"])


# What is written ------------------------------------------------------------------------------------------------


def test_the_report_goes_into_the_run_store_or_where_it_is_told(dense: Run, tmp_path: Path) -> None:
    for out, place in ((None, dense.config.store.run / "report"), (str(tmp_path / "there"), tmp_path / "there")):
        result = report.run(dense.config, out=out)
        names = {Path(path).name for path in result["files"]}
        assert {"report.html", "report.json", "frontier.png", "format_map.png", "sensitivity.png"} <= names
        assert {path.name for path in place.iterdir()} == names
        assert all((place / name).read_bytes().startswith(PNG) for name in names if name.endswith(".png"))
        body = json.loads((place / "report.json").read_text())
        assert body["schema"] == 1
        assert Path(result["report"]) == place / "report.html"


@pytest.mark.s3
def test_the_report_may_go_into_a_bucket(dense: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server() as server:
        server.make_bucket("reports")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        result = report.run(dense.config, out="s3://reports/deep")
        assert result["report"] == "s3://reports/deep/report.html"
        store = Store("s3://reports/deep")
        assert {f"s3://reports/deep/{key}" for key in store.list()} == set(result["files"])
        assert json.loads(store.get("report.json"))["schema"] == 1


def test_a_report_that_has_no_place_is_refused_in_one_line(dense: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    config = dense.config.store.run.parent / "config.yaml"
    result = CliRunner().invoke(cli, ["report", str(config), "--out", str(tmp_path / "file")])
    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_every_key_of_the_json_is_documented(found: dict[str, Any]) -> None:
    documented = (ROOT / "docs/report.md").read_text()
    assert [key for key in found if f"`{key}`" not in documented] == []
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["settings"]["calibration"]["sequences"] == 6
    versions = {"prismaquant_ray", "torch", "transformers", "compressed-tensors", "ray", "python"}
    assert all(found["versions"][name] for name in versions)
    assert found["calibration"]["fingerprint"]["calibration.sequences"] == 6
    assert found["calibration"]["digest"]


def test_plots_show_what_the_run_has(found: dict[str, Any], dense: Run) -> None:
    with_experts = plots(found)
    assert set(with_experts) >= {"experts", "cost_split", "rounding", "most_sensitive"}
    plain = plots(report.gather(dense))
    assert "experts" not in plain
    assert all(data.startswith(PNG) for data in (*with_experts.values(), *plain.values()))


def test_names_that_mean_harm_are_text(dense: Run) -> None:
    html = page(enlarged(report.gather(dense), 2))
    assert HOSTILE in _text(html)
    assert "<img" not in html
    assert html.count("</script>") == 2
    plots(enlarged(report.gather(dense), 2))


@pytest.mark.parametrize("layers", [64, 126])
def test_a_large_model_has_a_page_below_a_megabyte(dense: Run, layers: int) -> None:
    found = report.gather(dense)
    html = page(enlarged(found, layers))
    assert len(found["plans"]) >= 8
    assert len(html.encode()) < 1e6
    assert html.count('class="cell ') == 4 * layers


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("allocation.max_bf16_fraction=0.05",), "The knee of the predicted frontier"),
        (("budget={vram: 1MB, context: 64}",), "Memory of a server with 1 × 64 tokens"),
        (("budget.bytes=280kB",), "280.0\u00a0kB"),
        (("sweep=[6.25]",), "The frontier has no knee"),
        (("sweep=[3, 6, 17]",), "No plan exists for 3, 17 bits per parameter"),
    ],
)
def test_every_kind_of_plan_is_shown(dense: Run, overrides: tuple[str, ...], says: str) -> None:
    config = load(dense.config.store.run.parent / "config.yaml", overrides[-1:])
    found = report.gather(reopened(config))
    assert says in _text(page(found))
    assert (found["frontier"] is None) == (config.allocation.max_bf16_fraction is not None)
    assert found["plans"][found["budget"]]["target"] == config.budget.target
    json.dumps(found, allow_nan=False)


def test_another_objective_has_no_standard_errors_and_no_split(dense: Run) -> None:
    allocation = dense.config.allocation.model_copy(update={"objective": "fisher_trace"})
    found = report.gather(reopened(dense.config.model_copy(update={"allocation": allocation})))
    assert all(plan["standard_error"] is None for plan in found["plans"])
    assert found["composition"]["all"]["cross_cost"] is None
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
        (formatting.target("24000000000B-vram-2x32768-auto"), "24.0\u00a0GB of VRAM (2 x 32768 tokens)"),
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


def test_marks_stand_where_their_figures_are(found: dict[str, Any]) -> None:
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
