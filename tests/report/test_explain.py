"""Claims about `explain`: the reason of a module's format is the one that the allocator had."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jobs.command_line import cli
from jobs.pipeline.measured import Measured
from prismaquant_ray.allocation.frontier import frontier
from prismaquant_ray.allocation.plans import Planner
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.report.explanation import Explanation, explain, nats_per_byte
from prismaquant_ray.serialization import to_json
from prismaquant_ray.settings.allocation import AllocationConfig, FormatRule, LimitsConfig
from prismaquant_ray.settings.budget import BudgetConfig
from tests.reported import measured_run, reopened
from tests.tiny import make_checkpoint
from tests.tiny_families import make_family


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    directory = tmp_path_factory.mktemp("dense")
    return measured_run(directory, make_checkpoint(directory / "source", "llama"))


def planner_of(
    known: Measured, budget: BudgetConfig | None = None, allocation: AllocationConfig | None = None
) -> Planner:
    """The plans of the same prices under another budget or other rules."""
    update = {"budget": budget, "allocation": allocation}
    config = known.config.model_copy(update={key: value for key, value in update.items() if value is not None})
    return reopened(config).planner


def explained(planner: Planner, name: str) -> Explanation:
    return explain(planner, planner.plan, name)


def test_the_price_of_a_byte_is_the_slope_of_the_best_plans(dense: Measured) -> None:
    """By brute force: every combination of formats, and of them the lower convex hull of loss over bytes."""
    planner = dense.planner
    problem = planner.problem(planner.config.budget)
    rows = np.arange(len(problem.groups))
    plans = np.array(list(itertools.product(range(len(problem.formats)), repeat=len(rows))))
    sizes, costs = problem.size[rows, plans].sum(1), problem.cost[rows, plans].sum(1)
    spent = int(problem.size[rows, problem.columns(planner.plan.choice)].sum())
    multiplier = nats_per_byte(planner, planner.plan)
    assert multiplier is not None
    assert multiplier > 0
    # No plan lies below the line of this slope through the frontier at the plan's bytes.
    curve = frontier(problem)
    at = np.interp(spent, curve.bytes, curve.cost)
    assert (costs + multiplier * (sizes - spent) >= at - 1e-12).all()
    touching = np.isclose(costs + multiplier * (sizes - spent), at, rtol=0, atol=1e-12)
    assert sizes[touching].min() <= spent < sizes[touching].max(), "and it touches plans on both sides"


@pytest.mark.parametrize("bpp", [4.75, 5.5, 6.25, 9.0])
def test_a_format_is_the_best_at_that_price_or_said_to_fill_up(dense: Measured, bpp: float) -> None:
    planner = planner_of(dense, BudgetConfig(bpp=bpp))
    away = 0
    for group in dense.layout.groups:
        found = explained(planner, group.name)
        assert found.format == planner.plan.choice[group.name]
        assert found.nats_per_byte is not None
        worth = {
            entry.format: (entry.predicted_loss or 0.0) + found.nats_per_byte * (entry.bytes or 0)
            for entry in found.alternatives
        }
        best = min(worth.values())
        if worth[planner.plan.choice[group.name]] <= best * (1 + 1e-9):
            assert "is the least of all formats" in found.reason
        else:
            away += 1
            assert f"by itself the group would be {min(worth, key=lambda name: worth[name])}" in found.reason
    assert away < len(dense.layout.groups) / 2


def test_what_a_saved_byte_costs_is_taken_against_the_next_larger_format(dense: Measured) -> None:
    found = explained(dense.planner, "model.layers.0.mlp.down_proj")
    assert [entry.format for entry in found.alternatives] == ["NVFP4", "MXFP8", "BF16"]
    small, middle, large = found.alternatives
    assert small.bytes is not None
    assert middle.bytes is not None
    assert small.predicted_loss is not None
    assert middle.predicted_loss is not None
    rate = (small.predicted_loss - middle.predicted_loss) / (middle.bytes - small.bytes)
    assert small.loss_per_byte_saved == pytest.approx(rate)
    # In BF16 nothing is lost but that its factors are stored in it.
    assert large.loss_per_byte_saved is None
    assert 0.0 < large.predicted_loss < 1e-2 * middle.predicted_loss
    price = dense.backward[0].groups["model.layers.0.mlp.down_proj"][FormatName.NVFP4]
    factor = dense.planner.table.optimism[FormatName.NVFP4].factor
    assert small.predicted_loss == pytest.approx(price.cost + (factor - 1) * price.weight_cost, rel=1e-12)
    lines = list(found.lines())
    assert lines[0] == f"{found.name} is {found.format} in the plan for 6.25bpp: {found.reason}"
    assert len(lines) == 2 + len(found.alternatives)
    assert "nats per byte saved against the next larger" in lines[2]
    assert json.loads(json.dumps(to_json(found), allow_nan=False))["format"] == str(found.format)


def test_a_linear_is_looked_up_in_its_group(dense: Measured) -> None:
    found = explained(dense.planner, "model.layers.1.self_attn.k_proj")
    assert found.group == "model.layers.1.self_attn.qkv_proj"
    assert found.format == dense.plan.choice[found.group]
    assert next(found.lines()).startswith("model.layers.1.self_attn.k_proj (in model.layers.1.self_attn.qkv_proj) is ")


def test_an_ignored_module_says_why(dense: Measured) -> None:
    found = explained(dense.planner, "model.embed_tokens")
    assert (found.group, found.format, found.alternatives) == (None, None, [])
    assert list(found.lines()) == ["model.embed_tokens stays as it is: embedding: never quantized"]


def test_an_unknown_name_is_answered_with_the_nearest(dense: Measured) -> None:
    with pytest.raises(InputError, match=r"no such module; did you mean model\.layers\.\d\.self_attn\.q_proj"):
        explained(dense.planner, "model.layers.0.self_atn.q_proj")
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.qkv_proj is the name of a group"):
        explained(dense.planner, "%%%")


def test_rules_are_named_where_they_leave_no_choice(dense: Measured) -> None:
    name = "model.layers.0.mlp.down_proj"
    allocation = AllocationConfig(
        force=(FormatRule(match="*.0.mlp.down_proj", format=FormatName.BF16),),
        floor=(FormatRule(match="*.1.mlp.*", format=FormatName.MXFP8),),
    )
    planner = planner_of(dense, BudgetConfig(bpp=9.0), allocation)
    found = explained(planner, name)
    assert found.format == "BF16"
    assert found.reason == "chosen because it is the only format that the group can have"
    refused = {entry.format: entry.refused for entry in found.alternatives}
    assert refused == {"BF16": None} | dict.fromkeys(
        ("NVFP4", "MXFP8"), "allocation.force *.0.mlp.down_proj makes it BF16"
    )
    assert f"  NVFP4    not possible: {refused[FormatName.NVFP4]}" in list(found.lines())
    floored = {entry.format: entry.refused for entry in explained(planner, "model.layers.1.mlp.down_proj").alternatives}
    assert floored[FormatName.MXFP8] is None
    assert floored[FormatName.NVFP4] == "allocation.floor *.1.mlp.* wants at least the bits of MXFP8"


def test_limits_on_time_leave_no_single_price(dense: Measured) -> None:
    planner = planner_of(dense, allocation=AllocationConfig(limits=LimitsConfig(prefill=1.25)))
    found = explained(planner, "model.layers.0.mlp.down_proj")
    assert found.nats_per_byte is None
    assert "limits on time count beside the budget" in found.reason


def test_bytes_are_those_that_the_budget_counts(dense: Measured) -> None:
    plan = dense.plan
    by_bpp, by_bytes = (
        explained(planner_of(dense, budget), "model.layers.0.mlp.down_proj")
        for budget in (None, BudgetConfig(bytes=plan.repository_bytes_at_most))
    )
    assert by_bytes.target == f"{plan.repository_bytes_at_most}B"
    assert by_bpp.alternatives[0].bytes is not None
    assert by_bytes.alternatives[0].bytes == by_bpp.alternatives[0].bytes + FORMATS[FormatName.NVFP4].extra_bytes()


def test_experts_have_the_runtime_s_refusal_and_every_expert_a_name(tmp_path: Path) -> None:
    formats = "formats=[NVFP4, NVFP4A16, MXFP8, BF16]"
    known = measured_run(tmp_path, make_family(tmp_path / "source", "qwen3_moe"), formats)
    group = next(group for group in known.layout.groups if group.experts is not None)
    found = explained(known.planner, group.linears[0].names[1])
    assert found.group == group.name
    refused = {entry.format: entry.refused for entry in found.alternatives if entry.refused}
    assert refused == {"NVFP4A16": FORMATS[FormatName.NVFP4A16].experts_refused}
    assert found.alternatives[-1].format == "NVFP4A16"
    assert explained(known.planner, group.name).alternatives == found.alternatives


def test_the_command_shows_the_reason_or_an_error_in_one_line(dense: Measured) -> None:
    config = str(dense.config.store.run.parent / "config.yaml")
    shown = CliRunner().invoke(cli, ["explain", config, "lm_head"])
    assert (shown.exit_code, shown.output) == (0, f"lm_head stays as it is: {dense.layout.ignored['lm_head']}\n")
    body = json.loads(CliRunner().invoke(cli, ["explain", config, "model.layers.0.mlp.down_proj", "--json"]).stdout)
    assert body["format"] == dense.plan.choice["model.layers.0.mlp.down_proj"]
    unknown = CliRunner().invoke(cli, ["explain", config, "lm_hed"])
    assert unknown.exit_code == 2
    assert unknown.stderr == "error: lm_hed: the model has no such module; did you mean lm_head?\n"
