"""Both runtimes read the configuration and give every Linear the scheme that was chosen for it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.layout import Block, BlockKind, FusedGroup, Layout, LinearSpec, Matrix
from prismaquant_ray.model import layout_builder
from prismaquant_ray.repository.quantization_config import build_quantization_config, config_group, targets
from prismaquant_ray.repository.routing import (
    config_problems,
    experts_route,
    fused_mapping,
    is_ignored,
    named_groups,
    route_problems,
    transformers_route,
    vllm_route,
)
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.spelling import Spelling
from prismaquant_ray.storage.store import Store
from tests.repositories import Choice, everything, mixed, mixed_choice, uniform
from tests.tiny_families import FAMILIES, make_family

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


def linear_of(name: str, out_features: int = 8, in_features: int = 128, experts: int | None = None) -> LinearSpec:
    return LinearSpec(
        name=name, out_features=out_features, in_features=in_features, sources=(f"{name}.weight",), experts=experts
    )


def matrix_of(name: str, *linears: LinearSpec) -> Matrix:
    parameters = tuple(f"{linear.name.partition('.')[2]}.weight" for linear in linears)
    return Matrix(name=name, input=name, linears=linears, parameters=parameters)


def layout_of(
    layers: int,
    *,
    width: int = 256,
    ignored: Mapping[str, str] | None = None,
    experts: int = 0,
    spellings: tuple[Spelling, ...] = (),
) -> Layout:
    """Attention fused, an MLP pair fused, and o_proj and down_proj alone; down_proj is 160 wide.

    With experts, every second layer has these in place of its MLP.
    """
    blocks = []
    for index in range(layers):
        prefix = f"model.layers.{index}"
        places = {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.o_proj": ("self_attn.o_proj",),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down_proj": ("mlp.down_proj",),
        }
        groups = []
        for place, members in places.items():
            if experts and index % 2 and place.startswith("mlp"):
                continue
            in_features = 160 if place == "mlp.down_proj" else width
            linears = [linear_of(f"{prefix}.{member}", 32, in_features) for member in members]
            groups.append(FusedGroup(name=f"{prefix}.{place}", matrices=(matrix_of(f"{prefix}.{place}", *linears),)))
        if experts and index % 2:
            parent = f"{prefix}.mlp.experts"
            gate, up, down = (
                linear_of(f"{parent}.{{}}.{leaf}_proj", 32, in_features, experts)
                for leaf, in_features in (("gate", width), ("up", width), ("down", 160))
            )
            matrices = (matrix_of(f"{parent}.gate_up_proj", gate, up), matrix_of(f"{parent}.down_proj", down))
            groups.append(FusedGroup(name=parent, matrices=matrices))
        block = Block(
            index=index, kind=BlockKind.DECODER, prefix=prefix, parameters=(), groups=tuple(groups), source_bytes=0
        )
        blocks.append(block)
    return Layout(
        architecture="LlamaForCausalLM",
        family="llama",
        blocks=tuple(blocks),
        embedding=("model.embed_tokens.weight",),
        pixels=(),
        head=(),
        ignored=dict(ignored if ignored is not None else {"lm_head": "output head"}),
        guesses=(),
        facts=(),
        spellings=spellings,
        named_by=None,
        hidden_size=width,
        vocab_size=64,
        image_token=None,
        top_k=2 if experts else 0,
        row_width=8,
    )


def choices(layout: Layout) -> st.SearchStrategy[Choice]:
    return st.fixed_dictionaries(
        {group.name: st.sampled_from(formats_of(group, tuple(FormatName))) for group in layout.groups}
    )


def built(layout: Layout, choice: Choice) -> dict[str, Any]:
    config = build_quantization_config(layout, choice)
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
MIXTURE = layout_of(4, experts=3, spellings=(Spelling(prefixes=(("model.", "language_model.model."),)),))


@pytest.mark.slow
@given(choices(LAYOUT))
def test_every_choice_is_routed_as_meant_by_both_runtimes(choice: Choice) -> None:
    are_routed_as_meant(LAYOUT, choice)


@pytest.mark.slow
@given(choices(MIXTURE))
def test_so_is_every_choice_for_experts_under_other_names(choice: Choice) -> None:
    are_routed_as_meant(MIXTURE, choice)


def are_routed_as_meant(layout: Layout, choice: Choice) -> None:
    config = build_quantization_config(layout, choice)
    if config is None:
        assert set(choice.values()) == {FormatName.BF16}
        return
    config = json.loads(json.dumps(config))
    assert list(config_problems(config)) == []
    assert list(route_problems(config, layout, choice, ["model.embed_tokens", "model.norm"])) == []
    get_what_was_chosen(config, layout, choice)


def get_what_was_chosen(config: dict[str, Any], layout: Layout, choice: Choice) -> None:
    """Every expert, under every name that a runtime has for it, and no name twice."""
    schemes = {group: without_targets(entry) for group, entry in config["config_groups"].items()}
    seen: dict[str, str] = {}
    for group in layout.groups:
        chosen = {linear: config_group(choice[group.name], linear) for linear in group.linears}
        for linear, scheme in chosen.items():
            for module in linear.names:
                for called in layout.aliases_of(module):
                    assert seen.setdefault(called, module) == module
                    assert len(named_groups(config, called)) == (scheme is not None)
                    assert is_ignored(config, called) is (scheme is None)
                    for route in (transformers_route(config, called), vllm_route(config, called)):
                        assert (schemes[route] if route else None) == scheme
        scheme = chosen[group.linears[0]]
        if group.experts is None:
            routes = [vllm_route(config, name, fused=fused_mapping(layout)) for name in layout.aliases_of(group.name)]
        else:
            names = layout.spelled([linear.names[0] for linear in group.linears])
            routes = [experts_route(config, called) for called in names]
        assert [schemes[route] if route else None for route in routes] == [scheme] * len(routes)
    for ignored in layout.ignored:
        for called in layout.aliases_of(ignored):
            assert named_groups(config, called) == set()
            assert is_ignored(config, called)
            assert transformers_route(config, called) is vllm_route(config, called) is None


def without_targets(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "targets"}


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


TAKEN = [name for name in FORMATS if name != "BF16" and all(formats_of(group, (name,)) for group in LAYOUT.groups)]


@pytest.mark.parametrize("name", TAKEN)
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
    assert build_quantization_config(LAYOUT, uniform(LAYOUT, FormatName.BF16)) is None


def test_everything_unquantized_is_ignored_by_name() -> None:
    ignored = {"lm_head": "head", "model.layers.3.mlp.gate": "router", "model.layers.11.mlp.gate": "router"}
    layout = layout_of(12, ignored=ignored)
    choice = uniform(layout, FormatName.FP8) | {"model.layers.1.self_attn.qkv_proj": FormatName.BF16}
    config = built(layout, choice)
    assert config["ignore"] == [
        r"re:^model\.layers\.(3|11)\.mlp\.gate$",
        r"re:^model\.layers\.1\.self_attn\.q_proj$",
        r"re:^model\.layers\.1\.self_attn\.k_proj$",
        r"re:^model\.layers\.1\.self_attn\.v_proj$",
        "lm_head",
    ]
    for name in [*ignored, "model.layers.1.self_attn.k_proj"]:
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
    assert json.dumps(build_quantization_config(LAYOUT, choice)) == json.dumps(
        build_quantization_config(LAYOUT, backwards)
    )


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
        build_quantization_config(LAYOUT, change(uniform(LAYOUT, FormatName.FP8)))


def test_a_format_the_shape_cannot_take_is_refused() -> None:
    layout = layout_of(1, width=40)
    with pytest.raises(InputError, match=r"self_attn\.qkv_proj cannot be NVFP4: in_features 40"):
        build_quantization_config(layout, uniform(layout, FormatName.NVFP4))


def test_a_format_the_runtime_cannot_load_for_experts_is_refused() -> None:
    choice = uniform(MIXTURE, FormatName.BF16) | {"model.layers.3.mlp.experts": FormatName.NVFP4A16}
    with pytest.raises(InputError, match=r"model\.layers\.3\.mlp\.experts cannot be NVFP4A16: vLLM 0\.32 waits"):
        build_quantization_config(MIXTURE, choice)


# Families -----------------------------------------------------------------------------------------------------

Layouts = Callable[..., Layout]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """Everything of a family that can be quantized; each once for the whole module."""

    @functools.cache
    def layout(family: str, layers: int | None = None, depth: int | None = None) -> Layout:
        return family_layout(tmp_path_factory.mktemp(family), family, layers, depth)

    return layout


def family_layout(directory: Path, family: str, layers: int | None, depth: int | None) -> Layout:
    overrides: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    if layers is not None and family.startswith(("qwen3_5", "gpt_oss")):
        other = "sliding" if family == "gpt_oss" else "linear"
        overrides["layer_types"] = [f"{other if i % 4 < 3 else 'full'}_attention" for i in range(layers)]
    if depth is not None:
        overrides["vision_config"] = {"depth": depth}
    source = Checkpoint(Store(make_family(directory, family, **overrides)))
    return layout_builder.build_layout(source, everything(source, family))[1]


@pytest.mark.parametrize("formats", [mixed_choice, mixed])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_a_family_gets_what_was_chosen_for_it_in_every_view(
    family: str, formats: Callable[[Layout], Choice], layouts: Layouts
) -> None:
    layout = layouts(family)
    choice = formats(layout)
    config = built(layout, choice)
    assert list(config_problems(config)) == []
    get_what_was_chosen(config, layout, choice)


@pytest.mark.parametrize(
    ("family", "name", "others"),
    [
        (
            "qwen3_5",
            "model.language_model.layers.0.linear_attn.out_proj",
            ["language_model.model.layers.0.linear_attn.out_proj", "model.layers.0.linear_attn.out_proj"],
        ),
        (
            "qwen3_5_moe",
            "model.language_model.layers.3.mlp.experts.7.up_proj",
            ["language_model.model.layers.3.mlp.experts.7.up_proj", "model.layers.3.mlp.experts.7.up_proj"],
        ),
        ("qwen3_5", "model.visual.blocks.1.mlp.linear_fc1", ["visual.blocks.1.mlp.linear_fc1"]),
        ("qwen3_5", "model.visual.merger.linear_fc2", ["visual.merger.linear_fc2"]),
        ("qwen3_5", "lm_head", ["language_model.lm_head"]),
        ("qwen3_5", "mtp.layers.0.mlp.down_proj", []),
        ("qwen3_5_moe", "mtp.layers.0.mlp.experts.7.up_proj", []),
        ("gpt_oss", "model.layers.1.self_attn.o_proj", ["model.layers.1.attn.o_proj"]),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2", []),
    ],
)
def test_a_module_is_a_target_by_each_name_that_a_runtime_has_for_it(
    family: str, name: str, others: list[str], layouts: Layouts
) -> None:
    layout = layouts(family)
    assert layout.aliases_of(name) == (name, *others)
    chosen = next(group for group in layout.groups if any(name in linear.names for linear in group.linears))
    for other, expected in ((FormatName.BF16, FormatName.FP8), (FormatName.FP8, FormatName.BF16)):
        config = built(layout, uniform(layout, other) | {chosen.name: expected})
        quantized = expected is FormatName.FP8
        for called in (name, *others):
            assert (vllm_route(config, called) is not None) is quantized
            assert (transformers_route(config, called) is not None) is quantized
            assert is_ignored(config, called) is not quantized


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_decoder_pattern_never_reaches_a_draft_nor_a_drafts_the_decoder(family: str, layouts: Layouts) -> None:
    layout = layouts(family)
    (draft,) = layout.of(BlockKind.DRAFT)
    own = {group.name for group in draft.groups}
    places = {
        linear.name.partition(".layers.")[2].partition(".")[2].replace("{}", "5")
        for block in layout.of(BlockKind.DECODER, BlockKind.DRAFT)
        for linear in block.linears
    }
    assert len(places) > 10
    for in_draft in (False, True):
        inside, outside = (FormatName.FP8, FormatName.BF16) if in_draft else (FormatName.BF16, FormatName.FP8)
        config = built(layout, {group.name: inside if group.name in own else outside for group in layout.groups})
        beyond = [f"mtp.layers.{index}.{place}" for index in range(1, 40) for place in places]
        beyond += [f"{prefix}mtp.layers.0.{place}" for prefix in ("model.", "language_model.") for place in places]
        beyond += [
            f"mtp.{prefix}.layers.0.{place}" for prefix in layout.aliases_of("model.language_model") for place in places
        ]
        for name in beyond:
            assert named_groups(config, name) == set(), name
            assert vllm_route(config, name) is transformers_route(config, name) is None
        for block in layout.of(BlockKind.DECODER, BlockKind.DRAFT):
            for linear in block.linears:
                for called in layout.aliases_of(linear.names[-1]):
                    assert bool(named_groups(config, called)) is ((block is draft) is in_draft), called


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "few", "many"),
    [
        ("qwen3_moe", (6, None), (18, None)),
        ("mixtral", (6, None), (18, None)),
        ("deepseek_v3", (7, None), (19, None)),
        ("qwen3_5", (12, 3), (36, 9)),
        ("qwen3_5_moe", (12, 3), (24, 6)),
        ("gpt_oss", (6, None), (18, None)),
    ],
)
def test_the_number_of_patterns_does_not_grow_with_layers_or_experts(
    family: str, few: tuple[int, int | None], many: tuple[int, int | None], layouts: Layouts
) -> None:
    counts = []
    for layers, depth in (few, many):
        layout = layouts(family, layers, depth)
        config = built(layout, mixed_choice(layout))
        counts.append((sum(len(entry["targets"]) for entry in config["config_groups"].values()), len(config["ignore"])))
    assert counts[0] == counts[1]


@settings(max_examples=50)
@given(st.data())
def test_targets_match_exactly_the_modules_they_were_made_from_in_every_view(data: st.DataObject) -> None:
    linears = list(MIXTURE.linears())
    names = data.draw(st.sets(st.sampled_from([linear.name for linear in linears])))
    made = targets(MIXTURE, [linear.name for linear in linears if linear.name in names])
    assert len(made) <= 10
    for linear in linears:
        for module in linear.names:
            called = MIXTURE.aliases_of(module)
            assert len(called) == 2
            assert [sum(bool(re.match(target[3:], name)) for target in made) for name in called] == [
                int(linear.name in names)
            ] * 2
        # A number of experts is not part of a pattern, but what is no number is no expert.
        for other in ("x", "", "1.2", "-1"):
            near = linear.name.replace("{}", other) if linear.experts else f"{linear.name}{other or '_'}"
            assert not any(re.match(target[3:], near) for target in made)


def test_experts_need_one_scheme_and_vllm_takes_that_of_the_first() -> None:
    names = ["a.experts.0.gate_proj", "a.experts.0.up_proj", "a.experts.0.down_proj"]
    config = config_of(
        group(r"re:^a\.experts\.\d+\.(gate|up)_proj$"), group(r"re:^a\.experts\.\d+\.down_proj$", bits=4)
    )
    with pytest.raises(InputError, match=r"projections of a\.experts get group_0, group_1"):
        experts_route(config, names)
    with pytest.raises(InputError, match="get group_0, no group"):
        experts_route(config_of(group(*names[:2])), names)
    assert experts_route(config_of(group(r"re:^a\.experts\.0\..*")), names) == "group_0"
    assert experts_route(config_of(group("re:.*", bits=4), ignore=tuple(names)), names) is None
    # vLLM asks for the experts as a whole, so a class does not reach them.
    assert experts_route(config_of(group("Linear")), names) is None


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
    assert fused_mapping(MIXTURE) == fused_mapping(LAYOUT)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_mapping_of_a_family_is_that_of_the_runtime(family: str, layouts: Layouts) -> None:
    # `packed_modules_mapping` of vLLM 0.32, as far as the tiny model has such a module.
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    delta = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}
    expected: dict[str, dict[str, tuple[str, ...]]] = {
        "qwen3_moe": {"qkv_proj": attention},
        "mixtral": {"qkv_proj": attention},
        "deepseek_v3": {"fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"), "gate_up_proj": mlp},
        "qwen3_5": {"qkv_proj": attention, "gate_up_proj": mlp, **delta},
        "gpt_oss": {"qkv_proj": attention},
    }
    base = family.removesuffix("_fp8").removesuffix("_text").removesuffix("_moe") if "3_5" in family else family
    assert fused_mapping(layouts(family)) == expected[base.removesuffix("_fp8")]


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
    linear = linear_of("a")
    for name, spec in FORMATS.items():
        scheme = config_group(name, linear)
        assert (scheme is None) == (spec.codec is None)
        if scheme is not None:
            assert spec.scheme is not None
            assert (scheme["weights"], scheme["input_activations"]) == spec.scheme(128)
