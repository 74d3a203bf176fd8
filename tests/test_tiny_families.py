from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from tests import tiny_families
from tests.tiny import LOGIT_STD, VOCABULARY, random_tokens
from tests.tiny_families import (
    COLD_EXPERT,
    FAMILIES,
    IMAGE_PAD,
    VISION_FAMILIES,
    ImagesOnlyProcessor,
    dequantize_blocks,
    make_family,
)

Image = pytest.importorskip("PIL.Image")

Make = Callable[[str], Path]


@pytest.fixture
def make(families: Mapping[str, Path]) -> Make:
    """Each family once for the whole session."""
    return families.__getitem__


def load(directory: Path) -> tuple[Any, dict[str, Any]]:
    sees = (directory / "preprocessor_config.json").exists()
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True)
    return model.eval(), {what: names for what, names in info.items() if names}


def weights(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def routed(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Tokens per expert of every router."""
    counts: dict[str, Tensor] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            counts[name] = torch.bincount(output[-1].flatten(), minlength=len(module.weight))

        return hook

    hooks = [
        module.register_forward_hook(count(name))
        for name, module in model.named_modules()
        if name.endswith(("mlp.gate", "mlp.router"))
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.endswith("_fp8")])
def test_transformers_loads_every_tensor_and_the_model_speaks(make: Make, family: str) -> None:
    model, troubles = load(make(family))
    assert not troubles
    assert type(model).__name__ == model.config.architectures[0]
    with torch.no_grad():
        logits = model(random_tokens(4, 64, seed=1)).logits.float()
    assert logits.isfinite().all()
    assert 0.8 * LOGIT_STD < logits.std() < 1.25 * LOGIT_STD


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.endswith("_fp8")])
def test_every_layer_matters(make: Make, family: str) -> None:
    model, _ = load(make(family))
    tokens = random_tokens(2, 48, seed=2)
    language = model.model.language_model if family in VISION_FAMILIES else model.model
    with torch.no_grad():
        whole = model(tokens).logits.float()
        for layer in language.layers:
            for part in (getattr(layer, "linear_attn", None) or layer.self_attn, layer.mlp):
                hook = part.register_forward_hook(silence)
                changed = (model(tokens).logits.float() - whole).std()
                hook.remove()
                assert changed > 0.1 * whole.std()


def silence(module: Any, inputs: Any, output: Any) -> Any:
    return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen3_5_moe", "gpt_oss"])
def test_routers_use_every_expert_some_more_than_others(make: Make, family: str) -> None:
    model, _ = load(make(family))
    for counts in routed(model, random_tokens(8, 128, seed=3)).values():
        share = counts / counts.sum()
        assert (counts > 0).all()
        assert share.max() > 1.3 * share.median()
        if family == "qwen3_moe":
            assert share[COLD_EXPERT] < 0.02
            assert share.argmin() == COLD_EXPERT


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3_fp8", "qwen3_5_moe", "gpt_oss"])
def test_equal_arguments_give_equal_bytes(make: Make, tmp_path: Path, family: str) -> None:
    first = make(family)
    assert digests(first) == digests(make_family(tmp_path / "again", family))
    other = make_family(tmp_path / "other", family, seed=1)
    assert digests(first)["model.safetensors"] != digests(other)["model.safetensors"]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "qwen3_moe",
            "model.layers.1.mlp.experts.7.{gate,up,down}_proj.weight model.layers.0.mlp.gate.weight lm_head.weight",
        ),
        ("mixtral", "model.layers.1.block_sparse_moe.{experts.3.{w1,w2,w3},gate}.weight"),
        (
            "deepseek_v3",
            "model.layers.0.mlp.{gate,up,down}_proj.weight model.layers.1.mlp.gate.{weight,e_score_correction_bias} "
            "model.layers.2.mlp.{experts.7,shared_experts}.{gate,up,down}_proj.weight "
            "model.layers.2.self_attn.{q_a_proj,q_a_layernorm,q_b_proj,kv_a_proj_with_mqa,kv_a_layernorm,kv_b_proj,o_proj}"
            ".weight",
        ),
        (
            "qwen3_5",
            "model.language_model.{embed_tokens,norm,layers.3.self_attn.q_norm,layers.0.mlp.up_proj}.weight "
            "model.language_model.layers.0.linear_attn.{A_log,dt_bias,{conv1d,in_proj_qkv,in_proj_z,in_proj_a,in_proj_b,"
            "norm,out_proj}.weight} model.visual.{patch_embed.proj,merger.linear_fc2,blocks.1.attn.qkv}.{weight,bias} "
            "model.visual.pos_embed.weight lm_head.weight",
        ),
        (
            "qwen3_5_moe",
            "model.language_model.layers.0.mlp.{experts.{gate_up_proj,down_proj},shared_expert.{gate,up,down}_proj.weight,"
            "{gate,shared_expert_gate}.weight}",
        ),
        ("qwen3_5_text", "model.layers.{0.linear_attn.in_proj_qkv,3.self_attn.q_proj}.weight lm_head.weight"),
        ("qwen3_5_moe_text", "model.layers.3.mlp.experts.{gate_up,down}_proj"),
        (
            "gpt_oss",
            "model.layers.1.mlp.{experts.{gate_up,down}_proj{,_bias},router.{weight,bias}} "
            "model.layers.1.self_attn.{sinks,q_proj.{weight,bias}}",
        ),
    ],
)
def test_tensors_are_named_as_on_the_hub(make: Make, family: str, names: str) -> None:
    assert set(expanded(names)) <= set(weights(make(family)))


def expanded(names: str) -> list[str]:
    """A shell's brace expansion."""
    done: list[str] = []
    waiting = names.split()
    while waiting:
        name = waiting.pop()
        if brace := re.search(r"\{([^{}]*)\}", name):
            waiting += [name[: brace.start()] + choice + name[brace.end() :] for choice in brace[1].split(",")]
        else:
            done.append(name)
    return done


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_bfloat16_but_for_what_the_hub_keeps_in_float32(make: Make, family: str) -> None:
    state = weights(make(family))
    for name, tensor in state.items():
        expected = torch.bfloat16
        if name.endswith(("e_score_correction_bias", "A_log", "linear_attn.norm.weight", "_scale_inv")):
            expected = torch.float32
        elif f"{name}_scale_inv" in state:
            expected = torch.float8_e4m3fn
        assert tensor.dtype == expected, name
        assert tensor.float().isfinite().all(), name
        assert tensor.numel() == 1 or tensor.float().std() > 0, name


def test_the_fp8_family_is_the_bfloat16_one_in_blocks(make: Make) -> None:
    plain, stored = weights(make("deepseek_v3")), weights(make("deepseek_v3_fp8"))
    scaled = {name for name in plain if f"{name}_scale_inv" in stored}
    assert set(stored) == set(plain) | {f"{name}_scale_inv" for name in scaled}
    grids = set()
    for name, weight in plain.items():
        if name in scaled:
            scale = stored[f"{name}_scale_inv"]
            rows, columns = weight.shape
            assert scale.shape == (-(-rows // 128), -(-columns // 128))
            assert stored[name].shape == weight.shape
            error = (dequantize_blocks(stored[name], scale) - weight.float()).abs()
            # Half a step of three mantissa bits, or of the smallest subnormal.
            steps = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            assert (error <= 1.001 * torch.maximum(weight.float().abs() / 16, steps * 2.0**-10)).all()
            grids.add((tuple(scale.shape), rows % 128 > 0, columns % 128 > 0))
        else:
            assert torch.equal(stored[name], weight)
            assert not re.search(r"layers.*proj", name)
    assert len(scaled) == 3 * 5 + 3 + 2 * 9 * 3
    assert {((1, 2), True, True), ((2, 1), True, False), ((3, 2), True, True), ((2, 1), False, True)} <= grids
    quantization = json.loads((make("deepseek_v3_fp8") / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_draft_layer_has_the_shapes_of_a_full_attention_layer(make: Make, family: str) -> None:
    state = weights(make(family))
    hidden = 128
    mtp = {name.removeprefix("mtp."): tuple(state[name].shape) for name in state if name.startswith("mtp.")}
    assert mtp.pop("fc.weight") == (hidden, 2 * hidden)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        assert mtp.pop(f"{norm}.weight") == (hidden,)
    body = "model.language_model.layers.3."
    layer = {name.removeprefix(body): tuple(state[name].shape) for name in state if name.startswith(body)}
    assert {name.removeprefix("layers.0."): shape for name, shape in mtp.items()} == layer
    assert layer["self_attn.q_proj.weight"] == (2 * 4 * 64, hidden)
    if family == "qwen3_5_moe":
        assert layer["mlp.experts.gate_up_proj"] == (8, 2 * 64, hidden)
        assert layer["mlp.experts.down_proj"] == (8, hidden, 64)
    assert AutoConfig.from_pretrained(make(family)).text_config.mtp_num_hidden_layers == 1


def test_shards_and_unpacked_drafts_hold_the_same_weights(make: Make, tmp_path: Path) -> None:
    whole = weights(make("qwen3_5_moe"))
    split = weights(make_family(tmp_path / "split", "qwen3_5_moe", shards=3, packed_mtp=False))
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(split)
    assert len(set(index["weight_map"].values())) == 3
    experts = "mtp.layers.0.mlp.experts"
    for expert, gate_up in enumerate(whole.pop(f"{experts}.gate_up_proj")):
        parts = [split.pop(f"{experts}.{expert}.{part}_proj.weight") for part in ("gate", "up")]
        assert torch.equal(torch.cat(parts), gate_up)
    for expert, down in enumerate(whole.pop(f"{experts}.down_proj")):
        assert torch.equal(split.pop(f"{experts}.{expert}.down_proj.weight"), down)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_overrides_reach_the_text_and_the_vision_configuration(tmp_path: Path) -> None:
    make_family(tmp_path, "qwen3_5", mtp_num_hidden_layers=0, intermediate_size=192, vision_config={"depth": 1})
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.text_config.intermediate_size == 192
    assert config.vision_config.depth == 1
    assert not any(name.startswith("mtp.") for name in weights(tmp_path))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_model_sees_images(make: Make, family: str) -> None:
    directory = make(family)
    processor = ImagesOnlyProcessor.from_pretrained(directory)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    assert "<|vision_start|><|image_pad|><|vision_end|>What" in prompt
    model, _ = load(directory)
    pattern = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = [Image.fromarray(pattern.numpy()), Image.new("RGB", (64, 64), (200, 30, 30))]
    logits = []
    for image in images:
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        assert inputs["pixel_values"].shape == (16, 3 * 2 * 16 * 16)
        assert (inputs["input_ids"] == IMAGE_PAD).sum() == 4
        assert inputs["input_ids"].max() < model.config.text_config.vocab_size
        with torch.no_grad():
            logits.append(model(**inputs).logits.float())
        assert logits[-1].isfinite().all()
    after = slice(-8, None)  # words behind the image
    assert (logits[0] - logits[1])[:, after].std() > 0.1 * logits[0][:, after].std()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5"])
def test_the_tokenizer_fits_the_vocabulary(make: Make, family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make(family))
    assert len(tokenizer) == VOCABULARY + (len(tiny_families.VISION_TOKENS) if family in VISION_FAMILIES else 0)
    text = "The old river, 1999!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "What?" in tokenizer.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=False)
