"""Claims about every architecture: run block by block it is the whole model, forward and backward, images included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from prismaquant_ray.calibration.images import load_images
from prismaquant_ray.errors import InputError
from prismaquant_ray.families import FAMILIES as KNOWN
from prismaquant_ray.layout import BlockKind, Layout
from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint
from prismaquant_ray.model.experts import Routing
from prismaquant_ray.model.layout_builder import Scope, build_layout
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.tiny import random_tokens
from tests.tiny_families import FAMILIES, VISION_FAMILIES, dequantize_blocks, make_family

IMAGES = Path(__file__).parents[2] / "configs/data/images/captions.jsonl"
NO_HEAD = ("gpt_oss",)


def runner_of(directory: Path, family: str) -> ModelRunner:
    scope = Scope(images=family in VISION_FAMILIES, head=family not in NO_HEAD)
    checkpoint = Checkpoint(Store(directory))
    return ModelRunner(checkpoint, dtype=torch.float32, device=torch.device("cpu"), scope=scope)


def inputs_of(directory: Path, runner: ModelRunner) -> list[dict[str, Tensor]]:
    """A microbatch of text, and one with an image where the model sees."""
    found = [{"input_ids": random_tokens(2, 24)}]
    if runner.layout.image_token is not None:
        images = load_images(IMAGES, directory, image_token=runner.layout.image_token, limit=1)
        found += [image.inputs for image in images]
    return found


class Streamed:
    """One microbatch run block by block: what enters every block, and the logits."""

    def __init__(self, runner: ModelRunner, inputs: dict[str, Tensor]) -> None:
        self.runner = runner
        self.inputs = inputs
        self.entering: dict[int, Tensor] = {}
        with torch.no_grad():
            features = None
            if "pixel_values" in inputs:
                with runner.pixels():
                    hidden = runner.patches(inputs)
                features = self.through(hidden, BlockKind.VISION, BlockKind.MERGER)
            with runner.entry():
                self.embedded = runner.embed(inputs, features)
            self.last = self.through(self.embedded, BlockKind.DECODER)
            with runner.exit():
                self.logits = runner.logits(self.last)

    def through(self, hidden: Tensor, *kinds: BlockKind) -> Tensor:
        for block in self.runner.layout.of(*kinds):
            self.entering[block.index] = hidden
            hidden = self.runner.run_block(block.index, self.runner.load_block(block.index), hidden, self.inputs)
        return hidden

    def gradients(self, direction: Tensor) -> dict[int, Tensor]:
        """∂⟨direction, logits⟩ by what enters each block, from the exit down."""
        found: dict[int, Tensor] = {}
        last = self.last.detach().requires_grad_()
        with self.runner.exit():
            (gradient,) = torch.autograd.grad(self.runner.logits(last), last, direction)
        for block in reversed(self.runner.layout.of(BlockKind.VISION, BlockKind.MERGER, BlockKind.DECODER)):
            if block.index not in self.entering:
                continue
            if block.kind is BlockKind.MERGER:
                gradient = gradient[self.inputs["input_ids"] == self.runner.layout.image_token]
            hidden = self.entering[block.index].detach().requires_grad_()
            output = self.runner.run_block(block.index, self.runner.load_block(block.index), hidden, self.inputs)
            (gradient,) = torch.autograd.grad(output, hidden, gradient)
            found[block.index] = gradient
        return found


def whole_model(directory: Path, family: str) -> Any:
    if family == "deepseek_v3_fp8":
        directory = decoded(directory)
    auto = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")


def decoded(directory: Path) -> Path:
    """The checkpoint with its FP8 weights written out in BF16, block by block; transformers would want a GPU."""
    twin = directory.with_name("decoded")
    if not twin.exists():
        shutil.copytree(directory, twin)
        tensors = load_file(directory / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight, scale = name.removesuffix("_scale_inv"), tensors.pop(name)
            tensors[weight] = dequantize_blocks(tensors[weight], scale).to(torch.bfloat16)
        save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((twin / "config.json").read_text())
        del config["quantization_config"]
        (twin / "config.json").write_text(json.dumps(config))
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_forward_equals_the_whole_model(families: Mapping[str, Path], family: str) -> None:
    directory = families[family]
    runner = runner_of(directory, family)
    whole = whole_model(directory, family)
    for inputs in inputs_of(directory, runner):
        with torch.no_grad():
            expected = whole(**inputs).logits
        found = Streamed(runner, inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_gradients_equal_autograd_through_the_whole_model(families: Mapping[str, Path], family: str) -> None:
    directory = families[family]
    runner = runner_of(directory, family)
    whole = whole_model(directory, family).requires_grad_(False)
    entered: list[Tensor] = []

    def capture(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entered.append(args[0] if args[0].requires_grad else args[0].requires_grad_())
        entered[-1].retain_grad()
        return (entered[-1], *args[1:])

    for block in runner.layout.of(BlockKind.VISION, BlockKind.MERGER, BlockKind.DECODER):
        whole.get_submodule(block.prefix).register_forward_pre_hook(capture)
    for inputs in inputs_of(directory, runner):
        entered.clear()
        logits = whole(**inputs).logits
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        logits.backward(direction)
        found = Streamed(runner, inputs).gradients(direction)
        assert len(found) == len(entered)
        for (index, gradient), tensor in zip(sorted(found.items()), entered, strict=True):
            assert tensor.grad is not None
            scale = float(tensor.grad.abs().max())
            assert scale > 0, f"block {index} gets a gradient"
            torch.testing.assert_close(gradient, tensor.grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_an_image_changes_positions_and_text_behind_one_that_had_an_image_does_not(
    families: Mapping[str, Path], family: str
) -> None:
    """The model keeps the shift of its last image; it must not reach the next microbatch."""
    runner = runner_of(families[family], family)
    text, image = inputs_of(families[family], runner)
    before = Streamed(runner, text).logits
    Streamed(runner, image)
    assert torch.equal(Streamed(runner, text).logits, before)
    blind = {name: value for name, value in image.items() if name == "input_ids"}
    embedded = Streamed(runner, image).embedded
    tokens = image["input_ids"] == runner.layout.image_token
    assert not torch.equal(embedded[tokens], Streamed(runner, blind).embedded[tokens])
    assert torch.equal(embedded[~tokens], Streamed(runner, blind).embedded[~tokens])


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_draft_head_is_the_formula_with_the_models_own_layer(families: Mapping[str, Path], family: str) -> None:
    """norm(layer(fc[norm(embed_{t+1}); norm(h_t)])), written out with transformers' classes and the stored tensors."""
    directory = families[family]
    runner = runner_of(directory, family)
    streamed = Streamed(runner, {"input_ids": random_tokens(2, 24)})
    (block,) = runner.layout.of(BlockKind.DRAFT)
    with torch.no_grad(), runner.beside(block.index):
        found = runner.run_block(block.index, runner.load_block(block.index), streamed.last, streamed.inputs)
        logits = runner.draft_logits(found)
    whole = whole_model(directory, family)
    language = whole.model.language_model
    source = Checkpoint(Store(directory))
    tensors = {
        name.removeprefix("mtp."): tensor.float()
        for name, tensor in source.read([name for name in source.tensors if name.startswith("mtp.")]).items()
    }
    layer = type(language.layers[3])(language.config, 3)
    layer.load_state_dict({k.removeprefix("layers.0."): v for k, v in tensors.items() if k.startswith("layers.0.")})
    tokens = streamed.inputs["input_ids"]
    with torch.no_grad():
        hidden = language(input_ids=tokens).last_hidden_state

        def normed(x: Tensor, name: str) -> Tensor:
            norm = type(language.norm)(x.shape[-1], eps=language.config.rms_norm_eps)
            norm.load_state_dict({"weight": tensors[f"{name}.weight"]})
            return norm(x)

        both = [
            normed(language.embed_tokens(tokens[:, 1:]), "pre_fc_norm_embedding"),
            normed(hidden[:, :-1], "pre_fc_norm_hidden"),
        ]
        entering = torch.cat(both, -1) @ tensors["fc.weight"].T
        positions = torch.arange(entering.shape[1]).expand(3, 2, -1)
        causal = torch.full((entering.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        output = layer(
            entering,
            position_embeddings=language.rotary_emb(entering, positions),
            attention_mask=causal,
            position_ids=positions[0],
        )
        expected = normed(output[0] if isinstance(output, tuple) else output, "norm")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, whole.lm_head(expected), rtol=1e-4, atol=1e-4)


# Layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_accounts_for_every_tensor(families: Mapping[str, Path], family: str) -> None:
    runner = runner_of(families[family], family)
    layout = runner.layout
    assert layout.family in {known.name for known in KNOWN}
    assert not layout.guesses
    loaded = [*layout.embedding, *layout.pixels, *(tensor for block in layout.blocks for tensor in block.tensors)]
    # The output head is a block of its own and part of the exit.
    assert set(loaded) | set(layout.head) == set(runner.checkpoint.tensors)
    assert len(loaded) == len(set(loaded))
    sources = [source for group in layout.groups for linear in group.linears for source in linear.sources]
    matrices = {name for name, info in runner.checkpoint.tensors.items() if len(info.shape) > 1}
    kept = {name for name in matrices if any(name.startswith(entry) for entry in layout.ignored)}
    assert kept | set(sources) == matrices, "every matrix is quantizable or kept with a reason"
    assert not kept & set(sources)
    assert all(reason for reason in layout.ignored.values())


def groups_of(layout: Layout, prefix: str) -> dict[str, list[str]]:
    return {
        group.name.removeprefix(prefix): [linear.name.removeprefix(prefix) for linear in group.linears]
        for group in layout.groups
        if group.name.startswith(prefix)
    }


def test_fused_groups_are_those_of_the_runtime(families: Mapping[str, Path]) -> None:
    hybrid = runner_of(families["qwen3_5_moe"], "qwen3_5_moe").layout
    assert groups_of(hybrid, "model.language_model.layers.0.") == {
        "linear_attn.out_proj": ["linear_attn.out_proj"],
        "linear_attn.in_proj_qkvz": ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"],
        "linear_attn.in_proj_ba": ["linear_attn.in_proj_b", "linear_attn.in_proj_a"],
        "mlp.shared_expert.gate_up_proj": ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
        "mlp.shared_expert.down_proj": ["mlp.shared_expert.down_proj"],
        "mlp.experts": [f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")],
    }
    inputs = {
        entry.name: [matrix.name for matrix in entry.matrices] for entry in hybrid.of(BlockKind.DECODER)[0].inputs
    }
    attention = "model.language_model.layers.0.linear_attn"
    assert inputs[f"{attention}.in_proj_qkvz"] == [f"{attention}.in_proj_qkvz", f"{attention}.in_proj_ba"]
    assert groups_of(hybrid, "mtp.") == {
        "layers.0.self_attn.qkv_proj": [f"layers.0.self_attn.{name}_proj" for name in "qkv"],
        "layers.0.self_attn.o_proj": ["layers.0.self_attn.o_proj"],
        "layers.0.mlp.shared_expert.gate_up_proj": [
            "layers.0.mlp.shared_expert.gate_proj",
            "layers.0.mlp.shared_expert.up_proj",
        ],
        "layers.0.mlp.shared_expert.down_proj": ["layers.0.mlp.shared_expert.down_proj"],
        "layers.0.mlp.experts": [f"layers.0.mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")],
    }
    latent = runner_of(families["deepseek_v3"], "deepseek_v3").layout
    assert groups_of(latent, "model.layers.1.self_attn.") == {
        "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
        "q_b_proj": ["q_b_proj"],
        "o_proj": ["o_proj"],
    }


def test_what_must_not_be_quantized_is_listed_with_its_reason(families: Mapping[str, Path]) -> None:
    kept = runner_of(families["qwen3_5_moe"], "qwen3_5_moe").layout.ignored
    layer = "model.language_model.layers.0"
    for name, word in {
        "model.visual.patch_embed.proj": "pixels",
        "model.visual.pos_embed": "position",
        f"{layer}.mlp.gate": "router",
        f"{layer}.mlp.shared_expert_gate": "shared expert",
        f"{layer}.linear_attn.conv1d": "convolution",
        "mtp.fc": "BF16",
        "mtp.layers.0.mlp.gate": "router",
        "model.language_model.embed_tokens": "embedding",
    }.items():
        assert word in kept[name]
    assert "block_sparse_moe.gate" in str(runner_of(families["mixtral"], "mixtral").layout.ignored)
    assert "kv_b_proj" in str(runner_of(families["deepseek_v3"], "deepseek_v3").layout.ignored)
    assert "biases" in runner_of(families["gpt_oss"], "gpt_oss").layout.ignored["model.layers.0.mlp.experts"]


def test_without_images_the_tower_stays_and_says_why(families: Mapping[str, Path]) -> None:
    _, layout = build_layout(Checkpoint(Store(families["qwen3_5"])))
    assert not layout.of(BlockKind.VISION, BlockKind.MERGER)
    assert layout.image_token is None
    assert "calibration.images" in layout.ignored["model.visual.blocks.0.attn.qkv"]
    assert "quantize_lm_head" in layout.ignored["lm_head"]


def test_a_head_that_cannot_be_quantized_is_refused(families: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quantize_lm_head is set, but the head stays: vLLM loads"):
        build_layout(Checkpoint(Store(families["gpt_oss"])), Scope(head=True))
    tied = make_family(tmp_path / "tied", "qwen3_moe", tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"tied to the embedding"):
        build_layout(Checkpoint(Store(tied)), Scope(head=True))


def test_a_missing_expert_is_named(families: Mapping[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(families["qwen3_moe"], copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.3\.up_proj\.weight is missing"):
        build_layout(Checkpoint(Store(copy)))


def test_more_than_one_draft_layer_is_kept(families: Mapping[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(families["qwen3_5"], copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["mtp.layers.1.mlp.up_proj.weight"] = torch.ones(4, 4)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    _, layout = build_layout(Checkpoint(Store(copy)))
    assert not layout.of(BlockKind.DRAFT)
    assert "more than one layer" in layout.ignored["mtp.layers.0.mlp.up_proj"]


def test_a_mixture_without_a_family_is_guessed(families: Mapping[str, Path], tmp_path: Path) -> None:
    """OLMoE has no family; its experts are found by their form."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    checkpoint = Checkpoint(Store(tmp_path / "m"))
    runner = ModelRunner(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    assert runner.layout.family == "generic"
    assert any("no family" in fact for fact in runner.layout.facts)
    assert any(group.experts == 4 for group in runner.layout.groups)
    tokens = random_tokens(1, 16)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
    torch.testing.assert_close(Streamed(runner, {"input_ids": tokens}).logits, expected, rtol=1e-5, atol=1e-5)


def test_rows_sorted_by_expert_find_back_to_their_tokens() -> None:
    chosen = torch.tensor([[2, 0], [1, 2], [0, 2], [2, 1]])
    routing = Routing.of(chosen, 4)
    assert routing.counts.tolist() == [2, 2, 4, 0]
    assert chosen.flatten()[routing.order].tolist() == sorted(chosen.flatten().tolist())
    rows = torch.arange(8.0)[routing.order].unsqueeze(1)
    assert routing.to_tokens(rows).flatten().tolist() == [1, 5, 9, 13]
    assert routing.token[routing.first].tolist() == [0, 1, 2, 3]
    assert chosen.flatten()[routing.order][routing.first].tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize(("key", "value"), [("model_type", "nothing"), ("architectures", ["Qwen3ForCausalLM"])])
def test_a_class_that_is_not_the_configurations_is_refused(
    families: Mapping[str, Path], tmp_path: Path, key: str, value: object
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(families["mixtral"], copy)
    body = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**body, key: value}))
    with pytest.raises(InputError, match="transformers"):
        build_layout(Checkpoint(Store(copy)))


def test_experts_that_nothing_can_watch_stay_and_the_rest_goes_through(tmp_path: Path) -> None:
    """Llama 4 packs its experts and computes them by code of its own."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=32,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Llama4ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m", save_original_format=False)
    runner = ModelRunner(Checkpoint(Store(tmp_path / "m")), dtype=torch.float32, device=torch.device("cpu"))
    (experts,) = [name for name in runner.layout.ignored if name.endswith(".experts")]
    assert "taken apart" in runner.layout.ignored[experts]
    assert all(group.experts is None for group in runner.layout.groups)
    tokens = random_tokens(1, 16)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
    torch.testing.assert_close(Streamed(runner, {"input_ids": tokens}).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_a_block_is_not_loaded_beside_itself(families: Mapping[str, Path]) -> None:
    runner = runner_of(families["qwen3_moe"], "qwen3_moe")
    (block,) = runner.layout.of(BlockKind.HEAD)
    hidden, inputs = torch.randn(1, 4, runner.layout.hidden_size), {"input_ids": random_tokens(1, 4)}
    module = runner.load_block(block.index)
    with torch.no_grad(), runner.beside(block.index):
        assert runner.meta_model.model.get_output_embeddings().weight.is_meta
        found = runner.run_block(block.index, module, hidden, inputs)
    with torch.no_grad(), runner.exit():
        assert torch.equal(found, runner.logits(hidden))


def test_a_scheme_inside_the_text_configuration_is_refused_at_once(
    families: Mapping[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(families["qwen3_5"], copy)
    body = json.loads((copy / "config.json").read_text())
    body["text_config"]["quantization_config"] = {"quant_method": "gptq"}
    (copy / "config.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match="already quantized"):
        build_layout(Checkpoint(Store(copy)))


def test_a_configuration_alone_answers_for_shapes(families: Mapping[str, Path], tmp_path: Path) -> None:
    for family in ("mixtral", "qwen3_5_moe"):
        place = tmp_path / family
        place.mkdir()
        shutil.copy(families[family] / "config.json", place)
        assert ConfigOnlyCheckpoint.fits(Store(place))
        shapes, whole = ConfigOnlyCheckpoint(Store(place)), Checkpoint(Store(families[family]))
        scope = Scope(images=family in VISION_FAMILIES, head=True)
        ours, theirs = build_layout(shapes, scope)[1], build_layout(whole, scope)[1]
        assert [group.name for group in ours.groups] == [group.name for group in theirs.groups]
        assert [group.parameters for group in ours.groups] == [group.parameters for group in theirs.groups]
        assert [block.source_bytes for block in ours.blocks if block.kind is not BlockKind.DECODER] == [
            block.source_bytes for block in theirs.blocks if block.kind is not BlockKind.DECODER
        ]
        with pytest.raises(InputError, match="a configuration and no weights"):
            shapes.read(["lm_head.weight"])
    assert not ConfigOnlyCheckpoint.fits(Store(families["mixtral"]))
