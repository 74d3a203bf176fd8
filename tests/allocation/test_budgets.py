"""Claims about budgets: memory is what hand arithmetic says, and rules and limits hold for every plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.pipeline.checks import fingerprint
from jobs.pipeline.inspection import inspect
from jobs.pipeline.run import Run
from prismaquant_ray.allocation.budget import CARD_BYTES, Sizes, measure
from prismaquant_ray.allocation.constraints import constrained
from prismaquant_ray.allocation.kv_cache import KvCache, Serving, draft_layers, kv_cache
from prismaquant_ray.config import Config, load_config
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formatting import server_memory as memory
from prismaquant_ray.layout import Block, BlockKind, FusedGroup, Layout, LinearSpec, Matrix
from prismaquant_ray.settings.allocation import AllocationConfig, FormatRule
from prismaquant_ray.settings.budget import BudgetConfig
from tests.inprocess import in_process, unopened
from tests.runs import assembled, configuration
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
GB = 10**9

# KV cache -------------------------------------------------------------------------------------------------------


def text_of(**body: Any) -> Any:
    """The text part of a configuration as transformers completes it."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[body["model_type"]].from_dict(body).get_text_config()


def shipped(model: str) -> Any:
    return text_of(**json.loads((ROOT / f"configs/models/{model}/config.json").read_text()))


def test_kv_cache_of_qwen36_27b() -> None:
    """16 of 64 layers attend, with 4 heads of 256; 48 keep a convolution of 10,240 channels and 48 matrices of 128²."""
    cache = kv_cache(shipped("qwen3.6-27b"), kv_cache="bf16", draft_layers=1)
    assert (cache.full_layers, cache.sliding_layers, cache.linear_layers, cache.draft_layers) == (16, 0, 48, 1)
    assert cache.token_bytes == 2 * 4 * 256 * 2 == 4096
    # One draft token: a column more than the kernel's three, and three states with that of the prefix cache.
    assert cache.state_bytes == 3 * ((4 - 1 + 1) * (2 * 16 * 128 + 48 * 128) * 2 + 48 * 128 * 128 * 4) == 9_682_944
    parts = cache.parts(32_768, 8)
    assert parts == {
        "full_attention": 8 * 32_768 * 65_536,  # 17.18 GB
        "sliding_attention": 0,
        "linear_attention": 8 * 464_781_312,  # 3.72 GB
        "draft": 8 * 32_768 * 4096,  # 1.07 GB
    }
    halved = kv_cache(shipped("qwen3.6-27b"), kv_cache="fp8", draft_layers=1).parts(32_768, 8)
    assert halved["full_attention"] == parts["full_attention"] // 2
    assert halved["linear_attention"] == parts["linear_attention"]


def test_kv_cache_of_qwen36_35b_a3b() -> None:
    """10 of 40 layers attend, with 2 heads of 256; no draft: two states, and three columns of 8,192 channels."""
    cache = kv_cache(shipped("qwen3.6-35b-a3b"), kv_cache="bf16")
    assert (cache.full_layers, cache.linear_layers) == (10, 30)
    assert cache.token_bytes == 2 * 2 * 256 * 2 == 2048
    assert cache.state_bytes == 2 * (3 * (2 * 16 * 128 + 32 * 128) * 2 + 32 * 128 * 128 * 4) == 4_292_608
    assert cache.total(262_144, 1) == 262_144 * 20_480 + 30 * 4_292_608


def test_kv_cache_of_smollm2() -> None:
    cache = kv_cache(
        text_of(
            model_type="llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
        ),
        kv_cache="bf16",
    )
    assert cache.token_bytes == 2 * 3 * 64 * 2 == 768
    assert cache.total(2048, 4) == 4 * 2048 * 30 * 768 == 188_743_680


def test_kv_cache_of_deepseek_v3_is_one_latent_vector_a_layer() -> None:
    text = text_of(model_type="deepseek_v3")  # the defaults are the model's
    cache = kv_cache(text, kv_cache="bf16", draft_layers=draft_layers(text, ["model.layers.61.eh_proj.weight"]))
    assert (cache.full_layers, cache.draft_layers) == (61, 1)
    assert cache.token_bytes == (512 + 64) * 2
    assert cache.total(1, 1) == 62 * 1152


def test_kv_cache_of_gemma_3_27b_keeps_a_window_in_five_of_six_layers() -> None:
    text = text_of(
        model_type="gemma3_text",
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        sliding_window=1024,
    )
    cache = kv_cache(text, kv_cache="bf16")
    assert (cache.full_layers, cache.sliding_layers, cache.window) == (10, 52, 1024)
    assert cache.token_bytes == 2 * 16 * 128 * 2 == 8192
    assert cache.total(131_072, 1) == 8192 * (10 * 131_072 + 52 * 1024)
    assert cache.total(500, 1) == 8192 * 62 * 500, "a context shorter than the window fills no window"


def test_a_window_counts_where_the_model_uses_it() -> None:
    mistral = text_of(model_type="mistral", sliding_window=4096)
    assert kv_cache(mistral, kv_cache="bf16").sliding_layers == 32
    assert kv_cache(text_of(model_type="mistral", sliding_window=None), kv_cache="bf16").full_layers == 32
    assert kv_cache(text_of(model_type="qwen2", sliding_window=4096), kv_cache="bf16").sliding_layers == 0


def test_a_draft_head_counts_when_its_tensors_are_there() -> None:
    text = shipped("qwen3.6-27b")
    assert draft_layers(text, ["model.language_model.layers.63.mlp.up_proj.weight"]) == 0
    assert draft_layers(text, ["mtp.fc.weight"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention", "conv"]}, "layers of type conv"),
        ({"num_kv_shared_layers": 10}, "num_kv_shared_layers"),
        ({"num_key_value_heads": -1}, "num_key_value_heads = -1"),
    ],
)
def test_a_cache_that_is_not_understood_is_refused(change: dict[str, Any], message: str) -> None:
    text = text_of(model_type="llama", num_hidden_layers=2)
    for name, value in change.items():
        setattr(text, name, value)
    with pytest.raises(InputError, match=message) as caught:
        kv_cache(text, kv_cache="bf16")
    assert "give budget.bytes or budget.bpp" in str(caught.value)


CACHE = KvCache(
    full_layers=3, sliding_layers=0, linear_layers=0, draft_layers=0, token_bytes=1000, state_bytes=0, window=0
)


@given(
    weights=st.integers(0, 10**12),
    margin=st.one_of(st.floats(0, 0.99), st.integers(0, 10**10)),
    context=st.integers(1, 10**6),
)
def test_the_memory_needed_is_the_least_that_has_the_room(weights: int, margin: float | int, context: int) -> None:
    serving = Serving(cache=CACHE, context=context, sequences=2, margin=margin)
    needed = serving.needed(weights)
    assert serving.room(needed) >= weights
    # A share near 1 moves the room by less than a byte a byte.
    assert serving.room(needed - 2 - int(2 / (1 - margin) if isinstance(margin, float) else 0)) < weights
    parts = serving.memory(weights)
    assert parts.weights + parts.kv_cache + parts.margin == parts.total == needed
    assert parts.kv_cache == 2 * context * 3000


# Rules ----------------------------------------------------------------------------------------------------------


def linear(name: str, out_features: int, in_features: int, experts: int | None = None) -> LinearSpec:
    return LinearSpec(
        name=name,
        out_features=out_features,
        in_features=in_features,
        sources=(f"{name}.weight",),
        experts=experts,
    )


def group(name: str, *members: LinearSpec) -> FusedGroup:
    matrix = Matrix(
        name=name, input=name, linears=members, parameters=tuple(f"{member.name}.weight" for member in members)
    )
    return FusedGroup(name=name, matrices=(matrix,))


def a_layout() -> Layout:
    """Two layers with fused q/k/v, a down projection that fits no MXFP8, and experts; an embedding that stays."""
    groups = [
        (
            group(f"layers.{i}.qkv_proj", *(linear(f"layers.{i}.{name}_proj", 64, 64) for name in "qkv")),
            group(f"layers.{i}.down_proj", linear(f"layers.{i}.down_proj", 64, 48)),
            group(
                f"layers.{i}.experts",
                *(linear(f"layers.{i}.experts.{{}}.{name}_proj", 64, 64, 2) for name in ("gate", "up")),
            ),
        )
        for i in range(2)
    ]
    blocks = tuple(
        Block(index=i, kind=BlockKind.DECODER, prefix=f"layers.{i}", parameters=(), groups=found, source_bytes=0)
        for i, found in enumerate(groups)
    )
    return Layout(
        architecture="Test",
        family="test",
        blocks=blocks,
        embedding=(),
        pixels=(),
        head=(),
        ignored={"embed_tokens": "embedding: never quantized"},
        guesses=(),
        facts=(),
        spellings=(),
        named_by=None,
        hidden_size=64,
        vocab_size=100,
        image_token=None,
        top_k=1,
        row_width=8,
    )


LAYOUT = a_layout()
FORMATS_USED = (FormatName.NVFP4, FormatName.MXFP8, FormatName.BF16)


def sizes_of(formats: Sequence[FormatName] = FORMATS_USED, **serving: Any) -> Sizes:
    return measure(LAYOUT, formats, ignored_bytes=1000, other_bytes=50, **serving)


def left(**allocation: Any) -> dict[str, set[str]]:
    """Formats that are left, by group."""
    found = constrained(sizes_of(), LAYOUT, AllocationConfig.model_validate(allocation))
    return {
        entry.name: {str(name) for name, is_left in zip(found.formats, row, strict=True) if is_left}
        for entry, row in zip(LAYOUT.groups, found.allowed, strict=True)
    }


def rule(match: str, name: str) -> list[dict[str, str]]:
    return [{"match": match, "format": name}]


def test_force_leaves_one_format_and_matches_groups_linears_and_every_expert() -> None:
    assert left(force=rule("layers.0.qkv_proj", "BF16"))["layers.0.qkv_proj"] == {"BF16"}
    assert left(force=rule("layers.?.[qkv]_proj", "BF16"))["layers.1.qkv_proj"] == {"BF16"}
    assert left(force=rule("layers.1.experts.*", "NVFP4"))["layers.1.experts"] == {"NVFP4"}
    untouched = left(force=rule("layers.1.experts.*", "NVFP4"))["layers.0.experts"]
    assert untouched == {"NVFP4", "MXFP8", "BF16"}


def test_floor_leaves_formats_with_as_many_bits_and_the_highest_floor_counts() -> None:
    found = left(floor=[*rule("layers.0.*", "MXFP8"), *rule("layers.0.qkv_proj", "BF16")])
    assert found["layers.0.experts"] == {"MXFP8", "BF16"}
    assert found["layers.0.down_proj"] == {"BF16"}, "48 columns fit no MXFP8; BF16 has more bits"
    assert found["layers.0.qkv_proj"] == {"BF16"}
    assert left(floor=rule("*", "FP8"))["layers.0.qkv_proj"] == {"MXFP8", "BF16"}, "a floor need not be one of formats"
    assert left(floor=rule("*", "NVFP4")) == left()
    assert left(force=rule("*.qkv_proj", "MXFP8"), floor=rule("*", "MXFP8"))["layers.0.qkv_proj"] == {"MXFP8"}


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ({"force": rule("layers.9.*", "BF16")}, "allocation.force layers.9.*: matches nothing; layers.0.qkv_proj is"),
        ({"floor": rule("*.Down_proj", "BF16")}, "allocation.floor *.Down_proj: matches nothing"),
        ({"force": rule("embed_*", "BF16")}, "matches embed_tokens, which stays as it is (embedding: never"),
        ({"force": rule("*.q_proj", "BF16")}, "matches layers.0.q_proj and not layers.0.k_proj"),
        ({"force": rule("*.experts.0.*", "BF16")}, "and not layers.0.experts.1.gate_proj"),
        ({"force": rule("*.down_proj", "MXFP8")}, "layers.0.down_proj cannot take MXFP8 ("),
        ({"force": rule("*", "INT4")}, "INT4 is not one of the formats; add it to formats"),
        (
            {"force": [*rule("*.qkv_proj", "BF16"), *rule("layers.1.*", "NVFP4")]},
            "layers.1.qkv_proj is to be NVFP4, and by *.qkv_proj BF16; keep one",
        ),
        (
            {"force": rule("*.qkv_proj", "NVFP4"), "floor": rule("layers.1.*", "MXFP8")},
            "layers.1.qkv_proj is to have at least the bits of MXFP8, and allocation.force *.qkv_proj makes it NVFP4",
        ),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused_by_name(allocation: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        left(**allocation)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_floor_above_every_format_is_refused() -> None:
    rules = AllocationConfig(floor=(FormatRule(match="*", format=FormatName.BF16),))
    with pytest.raises(InputError, match=r"none of the formats that layers.0.qkv_proj can take has the bits of BF16"):
        constrained(sizes_of((FormatName.NVFP4,)), LAYOUT, rules)


def test_bounds_of_a_budget_are_those_of_the_plans_that_keep_the_rules() -> None:
    free, bound = (
        sizes_of(),
        constrained(sizes_of(), LAYOUT, AllocationConfig(floor=(FormatRule(match="*", format="BF16"),))),
    )
    assert free.limit(BudgetConfig(bpp=5)) == 5 * LAYOUT.parameters // 8
    with pytest.raises(InputError, match=r"below the smallest plan; give one between 16.0000 and 16.0000"):
        bound.limit(BudgetConfig(bpp=5))


# Memory ---------------------------------------------------------------------------------------------------------


def with_serving(margin: float | int = 0.15, context: int = 100) -> Sizes:
    return sizes_of(serving=Serving(cache=CACHE, context=context, sequences=1, margin=margin))


def smallest_stored(sizes: Sizes) -> int:
    return int(np.where(sizes.allowed, sizes.stored, np.iinfo(np.int64).max).min(axis=1).sum())


def test_memory_left_for_candidates_is_what_cache_margin_and_kept_tensors_leave() -> None:
    sizes = with_serving(margin=0.1)
    vram = 400_000
    assert sizes.limit(BudgetConfig(vram=vram, context=100)) == vram - 40_000 - 300_000 - 1000
    assert with_serving(margin=5).limit(BudgetConfig(vram=vram, context=100)) == vram - 5 - 300_000 - 1000


def test_memory_for_everything_in_bf16_is_no_mistake() -> None:
    sizes = with_serving()
    assert sizes.limit(BudgetConfig(vram=10**9, context=100)) == 2 * LAYOUT.parameters


def test_memory_below_the_cache_alone_is_one_clear_refusal() -> None:
    sizes = with_serving(margin=0)
    with pytest.raises(InputError) as caught:
        sizes.limit(BudgetConfig(vram=200_000, context=100))
    message = str(caught.value)
    assert "not even the KV cache fits" in message
    assert "1 × 100 tokens" in message
    assert "kv_cache: fp8" in message
    assert "\n" not in message
    with pytest.raises(InputError, match=r"sequences or margin$"):
        sizes.in_fp8().limit(BudgetConfig(vram=100_000, context=100))
    needed = 300_000 + 1000 + smallest_stored(sizes)
    assert sizes.limit(BudgetConfig(vram=needed, context=100)) == smallest_stored(sizes)
    with pytest.raises(InputError, match="the smallest plan does not fit"):
        sizes.limit(BudgetConfig(vram=needed - 1, context=100))


def test_inspect_says_what_memory_is_made_of(tmp_path: Path) -> None:
    overrides = [f"store.run={tmp_path / 'run'}", f"store.output={tmp_path / 'out'}"]
    overrides.append("kv_cache=fp8")
    budget = "budget={vram: 32GB, context: 32768, sequences: 4, margin: 4GB}"
    result = inspect(
        load_config(ROOT / "configs/models/qwen3.6-27b/inspect.yaml", [*overrides, budget]), machines=["1x80GB"]
    )
    vram = result.vram
    assert vram is not None
    assert vram.total == 32 * GB
    assert vram.margin == 4 * GB
    assert vram.kv_cache == 4 * (32_768 * 17 * 2048 + 48 * 9_682_944)
    assert vram.weights == 32 * GB - 4 * GB - vram.kv_cache == result.budget_bytes + kept_bytes(result) + 17 * 2 * 4
    assert memory(vram).startswith("32.00 GB = weights 21.5")
    with pytest.raises(InputError, match="not even the KV cache fits"):
        inspect(
            load_config(ROOT / "configs/models/qwen3.6-27b/inspect.yaml", [*overrides, budget, "budget.sequences=64"]),
            machines=["1x80GB"],
        )


def kept_bytes(result: dict[str, Any]) -> int:
    return int(result.source_bytes - 2 * result.quantizable_parameters)


# Whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished tiny run; do not write into it but for plans."""
    directory = tmp_path_factory.mktemp("budgets")
    source = make_checkpoint(directory / "source", "llama", layers=3)
    config = configuration(directory / "run", source)
    Run(config, open_workers=in_process()).measure()
    return config


def changed(config: Config, output: Path, *, budget: dict[str, Any], **allocation: Any) -> Config:
    return config.model_copy(
        update={
            "budget": BudgetConfig.model_validate(budget),
            "allocation": AllocationConfig.model_validate(allocation),
            "store": config.store.model_copy(update={"output": output}),
        }
    )


def test_nothing_about_budgets_and_rules_changes_what_was_measured(tmp_path: Path, measured: Config) -> None:
    config = changed(
        measured,
        tmp_path / "out",
        budget={"vram": 10**8, "context": 64},
        force=rule("model.layers.0.self_attn.qkv_proj", "BF16"),
        floor=rule("*.down_proj", "MXFP8"),
        limits={"prefill": 1.5, "gpu": "h100"},
    )
    run = Run(measured)
    assert fingerprint(config, run.source, run.reader) == fingerprint(measured, run.source, run.reader)
    assert Run(config, open_workers=unopened).is_measured


def test_rules_hold_in_every_plan_frontier_and_knee(tmp_path: Path, measured: Config) -> None:
    config = changed(
        measured,
        tmp_path / "out",
        budget={"bpp": 7.0},
        force=rule("model.layers.0.self_attn.qkv_proj", "MXFP8"),
        floor=rule("model.layers.2.*", "MXFP8"),
        limits={"prefill": 1.7},
    )
    run = Run(config, open_workers=unopened)
    swept = run.measured().sweep
    assert 4.5 in swept.out_of_reach, "the rules make the smallest plan larger"
    for plan in [*swept.targets, run.measured().plan]:
        assert plan.choice["model.layers.0.self_attn.qkv_proj"] == "MXFP8"
        held = {plan.choice[entry.name] for entry in run.layout.blocks[2].groups}
        assert held <= {"MXFP8", "BF16"}
        assert plan.times.prefill <= plan.times.prefill_limit == 1.7
        assert plan.predicted_loss >= plan.bound
    losses = [plan.predicted_loss for plan in swept.targets]
    assert losses == sorted(losses, reverse=True)
    if swept.knee is not None:
        assert swept.knee.from_bpp >= min(plan.bpp for plan in swept.targets)
    kept = assembled(run)
    assert kept.bpp <= 7.0


def test_a_repository_with_the_largest_card_is_within_its_bytes(tmp_path: Path, measured: Config) -> None:
    run = Run(measured)
    sizes = run.sizes
    smallest = smallest_stored(sizes) + sizes.fixed
    config = changed(measured, tmp_path / "out", budget={"bytes": smallest + 5000})
    again = Run(config, open_workers=unopened)
    result = assembled(again)
    (tmp_path / "out" / "README.md").write_bytes(b"x" * CARD_BYTES)
    total = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert result.total_bytes <= total <= smallest + 5000


def test_memory_of_a_plan_is_every_tensor_the_repository_holds_and_the_rest(tmp_path: Path, measured: Config) -> None:
    text = text_of(**json.loads((Path(measured.model.source) / "config.json").read_text()))
    cache = kv_cache(text, kv_cache="bf16").total(64, 3)
    assert cache == 3 * 64 * 3 * (2 * 2 * 16 * 2)
    fits = Run(measured).sizes.loaded(smallest_stored(Run(measured).sizes))
    vram = fits + 4000 + cache + 10_000
    config = changed(measured, tmp_path / "out", budget={"vram": vram, "context": 64, "sequences": 3, "margin": 10_000})
    run = Run(config, open_workers=unopened)
    plan = run.measured().plan
    assembled(run, plan)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert plan.vram.weights == plan.loaded_bytes == index["metadata"]["total_size"]
    assert plan.vram.kv_cache == cache
    assert plan.vram.total <= vram
    assert plan.bpp > 4.5, "the room is used"
    assert (run.store.get(f"plans/{config.budget.target}.json")).startswith(b"{")


def test_all_three_figures_are_reported_for_every_kind_of_budget(tmp_path: Path, measured: Config) -> None:
    for budget in ({"bpp": 6.0, "context": 64}, {"bytes": 400_000, "context": 64}, {"vram": 10**9, "context": 64}):
        run = Run(changed(measured, tmp_path / "out", budget=budget), open_workers=unopened)
        plan = run.measured().plan
        assert plan.bpp > 4.5
        assert plan.repository_bytes_at_most > plan.loaded_bytes > plan.weight_bytes
        assert plan.vram.total > plan.loaded_bytes
    assert Run(measured).measured().plan.vram is None


def test_the_table_of_formats_ranks_nvfp4_and_nvfp4a16_alike() -> None:
    """They differ in activations only: the same bytes but for the input scale."""
    four, sixteen = FORMATS[FormatName.NVFP4], FORMATS[FormatName.NVFP4A16]
    assert four.weight_bytes(64, 64) == sixteen.weight_bytes(64, 64)
    assert four.extra_bytes() - sixteen.extra_bytes() == 4
