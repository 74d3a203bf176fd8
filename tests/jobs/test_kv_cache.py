"""Claims about a KV cache in FP8, from the configuration to the repository that is served, through whole small runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.pipeline.assembly import verify
from jobs.pipeline.inspection import inspect
from jobs.pipeline.measured_sweep import measure_plan
from jobs.pipeline.repository_evaluation import evaluate
from jobs.pipeline.run import Run
from prismaquant_ray.cache_rounding import cache_scale
from prismaquant_ray.compressed.view import RepositoryView
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.fold import Fold
from prismaquant_ray.layout import CachedAttention
from prismaquant_ray.records import PlanRecord
from prismaquant_ray.storage.store import Store
from tests.inprocess import in_process
from tests.runs import assembled, configuration, measured
from tests.tiny import make_checkpoint, make_text
from tests.tiny_families import make_family


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Values that differ by channel and outgrow the keys: two scales that cannot be mistaken for each other.
    directory = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", hidden=64, intermediate=96)
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if name.endswith("v_proj.weight"):
            tensors[name] *= torch.linspace(1, 6, len(tensors[name]))[:, None]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A measured run whose repository has an FP8 cache."""
    made = measured(configuration(tmp_path_factory.mktemp("run"), source, "kv_cache=fp8", evaluation=True))
    assembled(made)
    return made


def repository_of(run: Run) -> Path:
    assert isinstance(run.config.store.output, Path)
    return run.config.store.output


def with_settings(run: Run, **settings: object) -> Run:
    return Run(run.config.model_copy(update=settings), open_workers=in_process(1))


# The repository -------------------------------------------------------------------------------------------------


def test_a_repository_has_vllms_scheme_and_a_scale_for_keys_and_one_for_values_of_each_layer(run: Run) -> None:
    directory = repository_of(run)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert config["kv_cache_scheme"] == scheme
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    names = {f"model.layers.{layer}.self_attn.{part}_scale" for layer in (0, 1) for part in "kv"}
    assert {name for name in index if name.endswith(("k_scale", "v_scale"))} == names
    tensors = load_file(directory / next(iter(index.values())))
    records = run.measured().forward
    for name in names:
        assert (tensors[name].dtype, tensors[name].shape) == (torch.float32, (1,))
        assert torch.equal(tensors[name].bfloat16().float(), tensors[name])
    for layer in (0, 1):
        (scales,) = records[layer].cache.values()
        assert float(tensors[f"model.layers.{layer}.self_attn.k_scale"]) == scales.key == cache_scale(scales.key_amax)
        expected = scales.value if scales.folded_value is None else scales.folded_value
        assert float(tensors[f"model.layers.{layer}.self_attn.v_scale"]) == expected
    assert verify(run.config).problems == []


def test_values_that_a_plan_equalizes_have_the_scale_of_what_is_then_cached(run: Run) -> None:
    known = run.measured()
    layout, plan = run.layout, known.plan
    seen = 0
    for block in layout.blocks:
        record = known.forward[block.index]
        (scales,) = record.cache.values()
        folds = [fold for fold in record.folds if "self_attn.o_proj.weight" in columns_of(fold)]
        assert (scales.folded_value is not None) == bool(folds)
        kept = dict.fromkeys(plan.choice, "BF16")
        (attention,) = block.attention
        assert known.cache_scales(kept)[attention.name].value == scales.value  # type: ignore[arg-type]
        seen += bool(folds)
    assert seen


def columns_of(fold: Fold) -> set[str]:
    return {member.parameter for member in fold.multiplied}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [("k_scale", "model.layers.1.self_attn.k_scale is "), ("v_scale", "model.layers.1.self_attn.v_scale is ")],
)
def test_verify_finds_a_scale_that_is_not_the_measured_one(run: Run, tmp_path: Path, tensor: str, message: str) -> None:
    damaged = tmp_path / "repository"
    shutil.copytree(repository_of(run), damaged)
    (file,) = damaged.glob("*.safetensors")
    tensors = load_file(file)
    name = f"model.layers.1.self_attn.{tensor}"
    tensors[name] = torch.nextafter(tensors[name], torch.tensor(torch.inf))
    save_file(tensors, file)
    store = run.config.store.model_copy(update={"output": damaged})
    found = verify(run.config.model_copy(update={"store": store}))
    assert found.exit_code == 2
    assert any(problem.startswith(message) and "was measured" in problem for problem in found.problems)
    del tensors[name]
    save_file(tensors, file)
    found = verify(run.config.model_copy(update={"store": store}))
    assert f"tensor {name} is missing" in found.problems


def test_verify_finds_a_scheme_that_is_not_there(run: Run, tmp_path: Path) -> None:
    damaged = tmp_path / "repository"
    shutil.copytree(repository_of(run), damaged)
    path = damaged / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    path.write_text(json.dumps(config))
    store = run.config.store.model_copy(update={"output": damaged})
    problems = verify(run.config.model_copy(update={"store": store})).problems
    assert any("kv_cache_scheme" in problem for problem in problems)


def test_the_card_and_the_report_say_it(run: Run) -> None:
    readme = (repository_of(run) / "README.md").read_text()
    assert "| KV cache | FP8, with a scale" in readme
    assert "--kv-cache-dtype bfloat16" in readme
    assert "KV cache stay as they are" not in readme


# Prices and plans -----------------------------------------------------------------------------------------------


def test_a_plan_costs_what_its_formats_and_its_cache_cost(run: Run) -> None:
    rounded, known = run.measured().plan, with_settings(run, kv_cache="bf16").measured()
    plain, cache = known.plan, known.planner.table.cache
    assert cache is not None
    assert cache.cost > 0
    layers = [price for record in known.backward.values() for price in record.cache.values()]
    assert cache.cost == pytest.approx(sum(price.cost for price in layers))
    assert (rounded.choice, plain.choice) == (plain.choice, rounded.choice)
    assert rounded.predicted_loss == plain.predicted_loss + cache.cost
    assert rounded.bound <= rounded.predicted_loss
    assert rounded.standard_error == pytest.approx(np.hypot(plain.standard_error, cache.standard_error))
    assert rounded.kv_cache_loss == cache.cost
    assert (plain.kv_cache, plain.kv_cache_loss) == ("bf16", 0.0)
    # The measurements are those of either: nothing is run again, and the store is not refused.
    assert known.run_store.run == run.measured().run_store.run


def plans_within(run: Run, vram: int, context: int) -> dict[str, PlanRecord]:
    """The plan of each setting within a memory, where there is one."""
    found = {}
    for setting in ("bf16", "fp8", "auto"):
        budget = run.config.budget.model_copy(update={"bpp": None, "vram": vram, "context": context, "margin": 0})
        try:
            found[setting] = with_settings(run, kv_cache=setting, budget=budget).measured().planner.plan
        except InputError:
            continue
    return found


def test_auto_is_the_better_of_two_caches_for_every_memory(run: Run) -> None:
    sizes = run.sizes
    rows = np.where(sizes.allowed, sizes.stored, np.iinfo(np.int64).max)
    smallest, largest = (int(each.sum()) + sizes.ignored for each in (rows.min(1), sizes.stored.max(1)))
    chosen = set()
    for context in (16, 400):
        cache = with_settings(run, kv_cache="bf16", budget=run.config.budget.model_copy(update={"context": context}))
        serving = cache.sizes.serving
        assert serving is not None
        for vram in np.linspace(smallest + serving.cache_bytes // 2, largest + serving.cache_bytes, 9).astype(int):
            plans = plans_within(run, int(vram), context)
            both = [plans[setting] for setting in ("bf16", "fp8") if setting in plans]
            if not both:
                assert "auto" not in plans
                continue
            best = min(both, key=lambda plan: plan.predicted_loss)
            auto = plans["auto"]
            assert (auto.kv_cache, auto.choice, auto.predicted_loss) == (
                best.kv_cache,
                best.choice,
                best.predicted_loss,
            )
            assert auto.bound == min(plan.bound for plan in both)
            assert auto.vram is not None
            assert auto.vram.total <= vram
            chosen.add(auto.kv_cache)
    assert chosen == {"bf16", "fp8"}


# Measuring ------------------------------------------------------------------------------------------------------


def test_evaluate_measures_the_repository_with_its_cache(run: Run, source: Path, tmp_path: Path) -> None:
    directory = repository_of(run)
    plain = tmp_path / "plain"
    shutil.copytree(directory, plain)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (plain / "config.json").write_text(json.dumps(config))
    (file,) = plain.glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(("k_scale", "v_scale"))}
    save_file(tensors, file)
    index = plain / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    body["weight_map"] = {name: where for name, where in body["weight_map"].items() if name in tensors}
    index.write_text(json.dumps(body))
    text = make_text(tmp_path / "text", 8000, seed=9)
    rounded, kept = (
        evaluate(str(each), str(source), text, sequences=4, length=24, open_workers=in_process(1))
        for each in (directory, plain)
    )
    assert rounded.weights == kept.weights
    assert rounded.activations.kl_mean != kept.activations.kl_mean
    assert not any("cache" in note for note in rounded.notes)
    # What a run measures of its own plan is what anybody measures of its repository.
    known = run.measured()
    (entry,) = measure_plan(run, known, known.plan).plans
    assert entry.kv_cache == "fp8"
    assert entry.activations.kl_mean == pytest.approx(rounded.activations.kl_mean, rel=1e-6)


def test_the_cache_alone_costs_about_what_it_is_predicted_to(source: Path, tmp_path: Path) -> None:
    settings = ("kv_cache=fp8", "formats=[BF16]", "rounding.equalize=false")
    run = measured(configuration(tmp_path, source, *settings, bpp=16.0, sequences=16, evaluation=True))
    known = run.measured()
    plan = known.plan
    assert set(plan.choice.values()) == {"BF16"}
    assert plan.predicted_loss == plan.kv_cache_loss > 0
    (entry,) = measure_plan(run, known, plan).plans
    assert entry.weights is not None
    assert entry.weights.kl_mean == pytest.approx(0.0, abs=1e-9)
    assert entry.activations.kl_mean == pytest.approx(plan.predicted_loss, rel=0.35)
    # Nothing but the cache is quantized, and the repository says so.
    repository = Path(assembled(run).repository)
    config = json.loads((repository / "config.json").read_text())["quantization_config"]
    assert config["config_groups"] == {}
    assert config["kv_cache_scheme"] is not None


def test_scales_per_head_and_missing_ones_are_read_as_vllm_does(run: Run, tmp_path: Path) -> None:
    changed = tmp_path / "repository"
    shutil.copytree(repository_of(run), changed)
    config = json.loads((changed / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
    (changed / "config.json").write_text(json.dumps(config))
    (file,) = changed.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.5, 0.25]).view(2, 1, 1)
    save_file(tensors, file)
    scales = RepositoryView(Store(changed)).cache_scales(
        [*run.layout.attention, CachedAttention(name="model.layers.9.self_attn", path="self_attn")]
    )
    per_head = scales["model.layers.0.self_attn"].key
    assert isinstance(per_head, torch.Tensor)
    assert per_head.shape == (2, 1, 1)
    assert tuple(scales["model.layers.9.self_attn"]) == (1.0, 1.0)
    key = torch.randn(1, 2, 3, 4)
    rounded, _ = scales["model.layers.0.self_attn"].rounded(key, key)
    for head, scale in enumerate((0.5, 0.25)):
        expected = (key[:, head] / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(rounded[:, head], expected)
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.0])
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"model.layers.0.self_attn.k_scale of shape \(1,\) is no positive scale"):
        RepositoryView(Store(changed)).cache_scales(run.layout.attention)


# Refusals -------------------------------------------------------------------------------------------------------


def refused(config: Config) -> str:
    with pytest.raises(InputError) as caught:
        Run(config, open_workers=in_process(1)).check()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        inspect(config)
    return str(caught.value)


def test_a_cache_that_vllm_has_no_scales_for_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    source = make_family(tmp_path / "model", "deepseek_v3")
    config = configuration(tmp_path, source, "kv_cache=fp8")
    message = refused(config)
    assert message.startswith("the KV cache of DeepseekV3ForCausalLM stays in 16 bits: ")
    assert message.endswith("; write kv_cache: bf16")
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_cache_is_refused(source: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, source, "kv_cache=fp8")
    run = Run(config, open_workers=in_process(1))
    blocks = tuple(replace(block, attention=()) for block in run.layout.blocks)
    run.layout = replace(run.layout, blocks=blocks, kept_cache="no layer has keys and values to cache")
    with pytest.raises(InputError, match=r"16 bits: no layer has keys and values to cache; write kv_cache: bf16$"):
        run.check()
    run.layout = replace(run.layout, kept_cache=None)
    with pytest.raises(InputError, match="2 layers cache keys and values, and those of 0 are seen"):
        run.check()
    assert not (tmp_path / "run").exists()
