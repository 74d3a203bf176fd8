"""A plan handed to other quantizers: their files reach every Linear of transformers' model once."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_name
from torch import nn

from prismaquant_ray import formats
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.layout_builder import architecture_of, build_layout, transformers_config
from prismaquant_ray.model.on_meta import build_on_meta
from prismaquant_ray.repository import recipes
from prismaquant_ray.repository.quantization_config import config_group
from prismaquant_ray.repository.recipes import Tool, TransformersPlan, recipe_text, transformers_plan
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.repositories import SEVEN, Choice, everything
from tests.tiny import make_checkpoint
from tests.tiny_families import FAMILIES, make_family

#: With experts or without, with a tower and a draft head, and with module names that are not the checkpoint's.
MODELS = ("llama", "llama_untied", "gemma3_text", "qwen3_moe", "mixtral", "qwen3_5", "qwen3_5_moe", "deepseek_v3")


class Exported:
    """A model, a plan of it with every format that fits, and both files."""

    def __init__(self, directory: Path, name: str) -> None:
        make = make_family if name in FAMILIES else make_checkpoint
        self.source = Checkpoint(Store(make(directory / "source", name)))
        scope = everything(self.source, name) if name in FAMILIES else None
        self.layout = build_layout(self.source, *([] if scope is None else [scope]))[1]
        self.choice = every_format(self.layout)
        self.plan = transformers_plan(self.source, self.layout, self.choice)
        self.model = build_on_meta(transformers_config(self.source), architecture_of(self.source))
        self.linears = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}

    def body(self, tool: Tool) -> Any:
        return yaml.safe_load(recipe_text(tool, self.plan, "a plan"))

    @property
    def modifier(self) -> Any:
        return self.body(Tool.LLM_COMPRESSOR)["quant_stage"]["quant_modifiers"]["QuantizationModifier"]


def every_format(layout: Layout) -> Choice:
    """Formats that both tools have in turn, as far as they fit; experts stay."""
    choice = {}
    for place, group in enumerate(layout.groups):
        fitting = formats_of(group, SEVEN)
        choice[group.name] = FormatName.BF16 if group.experts is not None else fitting[place % len(fitting)]
    return choice


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("one"), "llama_untied")


def test_every_linear_of_transformers_is_in_one_group_or_ignored(exported: Exported) -> None:
    modifier = exported.modifier
    config = QuantizationConfig.model_validate(modifier)
    assert set(config.config_groups) == set(modifier["config_groups"])
    for name, module in exported.linears.items():
        groups = [
            entry
            for entry in modifier["config_groups"].values()
            if any(is_match(name, module, target) for target in entry["targets"])
        ]
        ignored = any(is_match(name, module, target) for target in modifier["ignore"])
        assert len(groups) + ignored == 1, name
        if name in exported.plan.quantized:
            chosen, linear = exported.plan.quantized[name]
            assert {key: value for key, value in groups[0].items() if key != "targets"} == config_group(chosen, linear)
            assert (linear.out_features, linear.in_features) == tuple(module.weight.shape)


def test_no_module_but_a_linear_is_a_target(exported: Exported) -> None:
    targets = [target for entry in exported.modifier["config_groups"].values() for target in entry["targets"]]
    reached = {name for name, _ in exported.model.named_modules() if any(match_name(name, each) for each in targets)}
    assert reached == exported.plan.quantized.keys()


def test_the_plan_reaches_transformers_but_for_a_draft_head(exported: Exported) -> None:
    linears = [
        linear
        for group in exported.layout.groups
        if FORMATS[exported.choice[group.name]].codec is not None
        for linear in group.linears
    ]
    found = {linear.name for _, linear in exported.plan.quantized.values()} | set(exported.plan.absent)
    assert found == {linear.name for linear in linears}
    assert all(name.startswith("mtp.") for name in exported.plan.absent)
    assert bool(exported.plan.absent) == any(block.prefix == "mtp" for block in exported.layout.blocks)
    text = recipe_text(Tool.MODELOPT, exported.plan, "a plan")
    assert ("transformers does not load them: mtp." in text) == bool(exported.plan.absent)


def test_modelopts_quantizers_are_those_of_the_plan_alone(exported: Exported) -> None:
    first, *entries = exported.body(Tool.MODELOPT)["quant_cfg"]
    assert first == {"quantizer_name": "*", "enable": False}
    for name in exported.linears:
        for place, kind in enumerate(("weight", "input", "output")):
            found = [
                each["cfg"] for each in entries if fnmatch.fnmatch(f"{name}.{kind}_quantizer", each["quantizer_name"])
            ]
            chosen, linear = exported.plan.quantized.get(name, (FormatName.BF16, None))
            attributes = FORMATS[chosen].modelopt
            expected = None if attributes is None or linear is None else (*attributes(linear.in_features), None)[place]
            assert found == ([] if expected is None else [expected])


def test_experts_that_stay_are_ignored_also_when_they_are_taken_apart(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "qwen3_moe")
    assert exported.plan.stacks == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    ignore = exported.modifier["ignore"]
    apart = [f"{stack}.{number}.gate_proj" for stack in exported.plan.stacks for number in (0, 7, 11)]
    assert all(any(match_name(name, target) for target in ignore) for name in apart)
    assert not any(match_name("model.layers.0.mlp.expertsX", target) for target in ignore)


def test_quantized_experts_are_refused_by_name(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "qwen3_moe")
    choice = exported.choice | {"model.layers.1.mlp.experts": FormatName.FP8}
    with pytest.raises(
        InputError, match=r"cannot quantize model\.layers\.1\.mlp\.experts \(FP8\): .*allocation\.force"
    ):
        transformers_plan(exported.source, exported.layout, choice)


def test_a_format_that_modelopt_has_not_is_refused_by_name(llama: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    without = {**FORMATS, FormatName.INT4: replace(FORMATS[FormatName.INT4], modelopt=None)}
    monkeypatch.setattr(recipes, "FORMATS", without)
    (name, *_) = [name for name, (chosen, _) in llama.plan.quantized.items() if chosen == FormatName.INT4]
    with pytest.raises(InputError, match=rf"ModelOpt 0\.47\.0 has no format for {name} \(INT4\)"):
        recipe_text(Tool.MODELOPT, llama.plan, "a plan")
    assert "group_0" in recipe_text(Tool.LLM_COMPRESSOR, llama.plan, "a plan")
    assert formats.FORMATS[FormatName.INT4].modelopt is not None


def test_formats_that_are_on_by_default_and_their_kin_are_modelopts_too() -> None:
    assert {name for name, entry in FORMATS.items() if entry.modelopt is not None} == {*SEVEN} - {FormatName.BF16}


@pytest.mark.parametrize("tool", Tool)
def test_the_file_says_what_does_not_travel(tool: Tool, llama: Exported) -> None:
    comments = " ".join(line for line in recipe_text(tool, llama.plan, "Plan X").splitlines() if line.startswith("#"))
    for words in ("Plan X", recipes.TRIED[tool], "Equalization factors", "searched scales", "GPTQ", "prices"):
        assert words in comments


def test_the_counts_are_of_transformers_linears(llama: Exported) -> None:
    plan: TransformersPlan = llama.plan
    assert sum(plan.counts.values()) == len(llama.linears)
    assert plan.linears[-1] == "lm_head"
