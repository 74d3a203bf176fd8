"""Both runtimes read the configuration and give every Linear the scheme that was chosen for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prismaquant_ray.checkpoint.quantization_config import build, scheme_of, targets
from prismaquant_ray.checkpoint.routing import (
    config_problems,
    fused_mapping,
    is_ignored,
    named_groups,
    route_problems,
    transformers_route,
    vllm_route,
)
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Block, FusedGroup, InputGroup, Layout, LinearSpec
from tests.repositories import Choice, mixed, uniform

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


def layout_of(layers: int, *, width: int = 256, kept: Mapping[str, str] | None = None) -> Layout:
    """Attention fused, an MLP pair fused, and o_proj and down_proj alone; down_proj is 160 wide."""
    blocks = []
    for index in range(layers):
        prefix = f"model.layers.{index}"
        places = {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.o_proj": ("self_attn.o_proj",),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down_proj": ("mlp.down_proj",),
        }
        groups = [
            FusedGroup(
                name=f"{prefix}.{place}",
                linears=tuple(
                    LinearSpec(
                        name=f"{prefix}.{member}",
                        out_features=32,
                        in_features=160 if place == "mlp.down_proj" else width,
                    )
                    for member in members
                ),
            )
            for place, members in places.items()
        ]
        inputs = tuple(InputGroup(name=group.name, groups=(group,)) for group in groups)
        blocks.append(Block(index=index, prefix=prefix, tensors=(), inputs=inputs, source_bytes=0))
    return Layout(
        architecture="LlamaForCausalLM",
        family="llama",
        blocks=tuple(blocks),
        embedding=("model.embed_tokens.weight",),
        head=(),
        kept=dict(kept if kept is not None else {"lm_head": "output head"}),
        guesses=(),
        hidden_size=width,
        vocab_size=64,
    )


def choices(layout: Layout) -> st.SearchStrategy[Choice]:
    return st.fixed_dictionaries({group.name: st.sampled_from(FormatName) for group in layout.groups})


def built(layout: Layout, choice: Choice) -> dict[str, Any]:
    config = build(layout, choice)
    assert config is not None
    return json.loads(json.dumps(config))  # type: ignore[no-any-return]


def group(*names: str, bits: int = 8) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    return {"targets": list(names), "weights": weights, "format": "float-quantized"}


def config_of(*groups: dict[str, Any], ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"config_groups": {f"group_{i}": entry for i, entry in enumerate(groups)}, "ignore": list(ignore)}


class Skeleton(nn.Module):
    """Modules with a layout's names, for compressed-tensors to walk."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        for linear in layout.linears():
            self._place(linear.name, nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta"))
        self._place("model.embed_tokens", nn.Embedding(4, 4, device="meta"))
        self._place("lm_head", nn.Linear(4, 4, device="meta"))

    def _place(self, name: str, module: nn.Module) -> None:
        *parents, leaf = name.split(".")
        parent: nn.Module = self
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, module)


LAYOUT = layout_of(12)


@given(choices(LAYOUT))
def test_every_choice_is_routed_as_meant_by_both_runtimes(choice: Choice) -> None:
    config = build(LAYOUT, choice)
    if config is None:
        assert set(choice.values()) == {FormatName.BF16}
        return
    config = json.loads(json.dumps(config))
    assert list(config_problems(config)) == []
    assert list(route_problems(config, LAYOUT, choice, ["model.embed_tokens", "model.norm"])) == []


def test_compressed_tensors_itself_attaches_the_chosen_schemes() -> None:
    choice = mixed(LAYOUT)
    config = built(LAYOUT, choice)
    model = Skeleton(LAYOUT)
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    for linear in LAYOUT.linears():
        found = getattr(model.get_submodule(linear.name), "quantization_scheme", None)
        route = transformers_route(config, linear.name)
        assert (found is None) == (route is None)
        if route is not None:
            expected = QuantizationConfig.model_validate(config).config_groups[route]
            assert found == expected
    assert not hasattr(model.get_submodule("lm_head"), "quantization_scheme")
    assert not hasattr(model.get_submodule("model.embed_tokens"), "quantization_scheme")


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].codec is not None])
def test_every_scheme_survives_json_and_compressed_tensors(name: FormatName) -> None:
    config = built(LAYOUT, uniform(LAYOUT, name))
    assert config["format"] == FORMATS[name].compression
    read = QuantizationConfig.model_validate(config)
    again = QuantizationConfig.model_validate(json.loads(read.model_dump_json()))
    for key, entry in config["config_groups"].items():
        for scheme in (read.config_groups[key], again.config_groups[key]):
            assert scheme.format == FORMATS[name].compression
            assert scheme.targets == entry["targets"]
            for part in ("weights", "input_activations"):
                arguments = getattr(scheme, part)
                assert (arguments is None) == (entry[part] is None)
                # The library does not write the zero-point type of symmetric schemes.
                for field, value in (entry[part] or {}).items():
                    found = getattr(arguments, field)
                    shown = str(found) if isinstance(found, torch.dtype) else found
                    assert shown == value or (field == "zp_dtype" and scheme is not read.config_groups[key])


def test_the_configuration_says_what_the_serving_contract_asks_for() -> None:
    config = built(LAYOUT, mixed(LAYOUT))
    fixed = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": "mixed-precision"}
    assert {key: config[key] for key in fixed} == fixed
    assert config["kv_cache_scheme"] is config["global_compression_ratio"] is None
    assert config["version"]
    for entry in config["config_groups"].values():
        assert list(entry) == ["targets", "weights", "input_activations", "output_activations", "format"]
        assert entry["output_activations"] is None
        if entry["format"] == "mxfp8-quantized":
            assert entry["weights"]["scale_dtype"] == entry["input_activations"]["scale_dtype"] == "torch.uint8"
        if entry["format"] == "nvfp4-pack-quantized" and entry["input_activations"]:
            assert entry["input_activations"]["dynamic"] == "local"


def test_int4_has_a_config_group_for_every_group_size() -> None:
    config = built(LAYOUT, uniform(LAYOUT, FormatName.INT4))
    sizes = {entry["weights"]["group_size"]: entry["targets"] for entry in config["config_groups"].values()}
    assert sizes.keys() == {128, 32}
    assert len(sizes[32]) == 1
    assert "down_proj" in sizes[32][0]
    assert config["format"] == "pack-quantized"


def test_nvfp4_with_and_without_activations_is_one_format_in_two_groups() -> None:
    config = built(LAYOUT, mixed(LAYOUT, (FormatName.NVFP4, FormatName.NVFP4A16)))
    assert config["format"] == "nvfp4-pack-quantized"
    assert [bool(entry["input_activations"]) for entry in config["config_groups"].values()] == [True, False]


def test_nothing_quantized_needs_no_configuration() -> None:
    assert build(LAYOUT, uniform(LAYOUT, FormatName.BF16)) is None


def test_everything_unquantized_is_ignored_by_name() -> None:
    kept = {"lm_head": "head", "model.layers.3.mlp.gate": "router", "model.layers.11.mlp.gate": "router"}
    layout = layout_of(12, kept=kept)
    choice = uniform(layout, FormatName.FP8) | {"model.layers.1.self_attn.qkv_proj": FormatName.BF16}
    config = built(layout, choice)
    assert config["ignore"] == [
        r"re:^model\.layers\.(3|11)\.mlp\.gate$",
        r"re:^model\.layers\.1\.self_attn\.q_proj$",
        r"re:^model\.layers\.1\.self_attn\.k_proj$",
        r"re:^model\.layers\.1\.self_attn\.v_proj$",
        "lm_head",
    ]
    for name in [*kept, "model.layers.1.self_attn.k_proj"]:
        assert is_ignored(config, name)
        assert transformers_route(config, name) is vllm_route(config, name) is None
    assert not is_ignored(config, "model.layers.11.self_attn.k_proj")


@given(st.sets(st.sampled_from([linear.name for linear in LAYOUT.linears()])))
def test_targets_match_exactly_the_names_they_were_made_from(names: set[str]) -> None:
    ordered = [linear.name for linear in LAYOUT.linears() if linear.name in names]
    made = targets(LAYOUT, ordered)
    assert len(made) <= 7
    matched = {linear.name for linear in LAYOUT.linears() if any(re.match(target[3:], linear.name) for target in made)}
    assert matched == names


@pytest.mark.parametrize(
    "near",
    [
        "model.layers.11.mlp.down_proj",
        "model.layers.01.mlp.down_proj",
        "model.layers.1.mlp.down_proj_2",
        "model.layers.1.mlp.down_proj.lora_A",
        "mtp.layers.1.mlp.down_proj",
        "mtp.model.layers.1.mlp.down_proj",
        "modelxlayers.1.mlp.down_proj",
        "model.layersx1.mlpxdown_proj",
        "language_model.model.layers.1.mlp.down_proj",
    ],
)
def test_a_target_does_not_reach_its_neighbours(near: str) -> None:
    choice = uniform(LAYOUT, FormatName.BF16) | {"model.layers.1.mlp.down_proj": FormatName.FP8}
    config = built(LAYOUT, choice)
    assert vllm_route(config, "model.layers.1.mlp.down_proj") == "group_0"
    assert transformers_route(config, "model.layers.1.mlp.down_proj") == "group_0"
    assert vllm_route(config, near) is transformers_route(config, near) is None
    assert named_groups(config, near) == set()


def test_equal_choices_give_equal_text_in_any_order() -> None:
    choice = mixed(LAYOUT)
    backwards = dict(reversed(choice.items()))
    assert json.dumps(build(LAYOUT, choice)) == json.dumps(build(LAYOUT, backwards))


def _missing(choice: Choice) -> Choice:
    return {name: value for name, value in choice.items() if name != "model.layers.2.self_attn.qkv_proj"}


def _unknown(choice: Choice) -> Choice:
    return choice | {"model.layers.99.mlp.down_proj": FormatName.FP8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_missing, "no format for model.layers.2.self_attn.qkv_proj"),
        (_unknown, "names model.layers.99.mlp.down_proj, which the model does not have"),
    ],
)
def test_a_plan_for_another_model_is_refused(change: Callable[[Choice], Choice], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build(LAYOUT, change(uniform(LAYOUT, FormatName.FP8)))


def test_a_format_the_shape_cannot_take_is_refused() -> None:
    layout = layout_of(1, width=40)
    with pytest.raises(InputError, match=r"q_proj cannot be NVFP4: in_features 40"):
        build(layout, uniform(layout, FormatName.NVFP4))


# The rules themselves -----------------------------------------------------------------------------------------


def test_vllm_takes_the_first_target_in_the_file_and_transformers_the_first_in_order() -> None:
    config = config_of(group("re:^model.*z_proj$"), group("re:^model.*_proj$"))
    name = "model.layers.0.z_proj"
    assert vllm_route(config, name) == "group_0"
    assert transformers_route(config, name) == "group_1"
    assert named_groups(config, name) == {"group_0", "group_1"}


def test_transformers_prefers_exact_names_to_patterns_to_classes() -> None:
    config = config_of(group("Linear"), group("re:.*o_proj"), group("model.o_proj"))
    assert transformers_route(config, "model.o_proj") == "group_2"
    assert transformers_route(config, "model.a.o_proj") == "group_1"
    assert transformers_route(config, "model.up") == "group_0"
    assert transformers_route(config, "model.up", nn.LayerNorm(1)) is None


def test_vllm_matches_classes_by_substring_and_only_after_names() -> None:
    config = config_of(group("Linear"), group("re:.*o_proj$"))
    assert vllm_route(config, "model.o_proj", class_name="RowParallelLinear") == "group_1"
    assert vllm_route(config, "model.up_proj", class_name="MergedColumnParallelLinear") == "group_0"
    assert vllm_route(config, "lm_head", class_name="ParallelLMHead") is None


def test_an_unanchored_pattern_reaches_longer_names_in_both_runtimes() -> None:
    config = config_of(group(r"re:model\.layers\.1"))
    for name in ("model.layers.1.mlp.down_proj", "model.layers.11.mlp.down_proj"):
        assert vllm_route(config, name) == transformers_route(config, name) == "group_0"
    assert vllm_route(config, "mtp.model.layers.1.mlp.down_proj") is None


def test_vllm_gives_a_fused_module_the_scheme_of_its_members() -> None:
    config = config_of(group(r"re:^a\.[qkv]_proj$"), group("b.q_proj", "b.k_proj", "b.v_proj"))
    assert vllm_route(config, "a.qkv_proj", fused=FUSED, class_name="") == "group_0"
    assert vllm_route(config, "b.qkv_proj", fused=FUSED, class_name="") == "group_1"
    assert vllm_route(config, "c.qkv_proj", fused=FUSED, class_name="") is None
    assert vllm_route(config, "a.qkv_proj", class_name="") is None


@pytest.mark.parametrize(
    "config",
    [
        config_of(group("a.q_proj"), group("a.k_proj", "a.v_proj")),
        config_of(group("a.q_proj", "a.k_proj")),
        config_of(group("a.q_proj", "a.k_proj", "a.v_proj"), ignore=("a.v_proj",)),
    ],
)
def test_members_of_a_fused_module_must_share_a_scheme(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"a\.qkv_proj"):
        vllm_route(config, "a.qkv_proj", fused=FUSED)


def test_a_fused_name_as_target_reaches_vllm_only() -> None:
    config = config_of(group("a.qkv_proj"))
    assert vllm_route(config, "a.qkv_proj", fused=FUSED) == "group_0"
    assert transformers_route(config, "a.q_proj") is None


def test_ignore_comes_before_targets_and_covers_fused_modules() -> None:
    config = config_of(group("re:.*"), ignore=(r"re:^a\.[qkv]_proj$", "b.o_proj", "c.qkv_proj"))
    assert vllm_route(config, "a.qkv_proj", fused=FUSED) is None
    assert vllm_route(config, "b.o_proj") is transformers_route(config, "b.o_proj") is None
    assert vllm_route(config, "c.qkv_proj", fused=FUSED) is None
    assert vllm_route(config, "b.o_proj2") == "group_0"


def test_the_fused_mapping_is_that_of_the_runtime() -> None:
    assert fused_mapping(LAYOUT) == {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }


def _no_status(config: dict[str, Any]) -> None:
    del config["quantization_status"]


def _no_group_format(config: dict[str, Any]) -> None:
    del config["config_groups"]["group_0"]["format"]


def _kv_cache(config: dict[str, Any]) -> None:
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}


def _wrong_format(config: dict[str, Any]) -> None:
    config["format"] = "float-quantized"


def _method(config: dict[str, Any]) -> None:
    config["quant_method"] = "fp8"


def _bad_pattern(config: dict[str, Any]) -> None:
    config["ignore"].append("re:(")


def _no_ignore(config: dict[str, Any]) -> None:
    del config["ignore"]


def _bad_scheme(config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["weights"]["num_bits"] = "four"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_status, "quantization_status"),
        (_no_group_format, "no format of its own"),
        (_kv_cache, "kv_cache_scheme"),
        (_wrong_format, "format float-quantized"),
        (_method, "quant_method"),
        (_bad_pattern, "cannot be read"),
        (_no_ignore, "cannot be read"),
        (_bad_scheme, "cannot be read"),
    ],
)
def test_a_configuration_that_would_be_misread_is_a_problem(
    damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    config = built(LAYOUT, mixed(LAYOUT))
    damage(config)
    assert any(message in problem for problem in config_problems(config))


def test_schemes_are_the_formats_own() -> None:
    linear = LinearSpec(name="a", out_features=8, in_features=128)
    for name, spec in FORMATS.items():
        scheme = scheme_of(name, linear)
        assert (scheme is None) == (spec.codec is None)
        if scheme is not None:
            assert spec.scheme is not None
            assert (scheme["weights"], scheme["input_activations"]) == spec.scheme(128)
