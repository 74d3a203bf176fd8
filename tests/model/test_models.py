"""Claims about running a model block by block: the same bits as the whole model, whatever the architecture."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prismaquant_ray.errors import InputError
from prismaquant_ray.families import FusedRule, family_of
from prismaquant_ray.model import layout_builder
from prismaquant_ray.model.capture import capture_activations
from prismaquant_ray.model.layout_builder import build_layout, transformers_config
from prismaquant_ray.model.on_meta import decoder_layers
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.tiny import ARCHITECTURES, make_checkpoint, random_tokens, read_config


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / request.param, request.param)


def runner_of(directory: Path) -> ModelRunner:
    return ModelRunner(Checkpoint(Store(directory)), dtype=torch.float32, device=torch.device("cpu"))


def streamed(runner: ModelRunner, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Hidden states at every boundary, and the logits."""
    inputs = {"input_ids": tokens}
    with runner.entry():
        boundaries = [runner.embed(inputs)]
    for index in range(len(runner.layout.blocks)):
        boundaries.append(runner.run_block(index, runner.load_block(index), boundaries[-1], inputs))
    with runner.exit():
        return boundaries, runner.logits(boundaries[-1])


def test_streaming_forward_equals_the_whole_model(checkpoint: Path) -> None:
    tokens = random_tokens(3, 48)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(tokens).logits
        _, logits = streamed(runner_of(checkpoint), tokens)
    assert torch.equal(logits, expected)


def test_streaming_gradients_equal_autograd_through_the_whole_model(checkpoint: Path) -> None:
    tokens = random_tokens(2, 24)
    runner = runner_of(checkpoint)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    captured: list[Tensor] = []
    for layer in whole.get_submodule(runner.meta_model.blocks_path):
        layer.register_forward_pre_hook(lambda _, args: captured.append(args[0]) or args[0].retain_grad())
    whole.requires_grad_(False)
    whole.get_input_embeddings().requires_grad_(True)
    logits = whole(tokens).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    logits.backward(direction)

    with torch.no_grad():
        boundaries, _ = streamed(runner, tokens)
    last = boundaries[-1].requires_grad_()
    with runner.exit():
        (gradient,) = torch.autograd.grad(runner.logits(last), last, direction)
    for index in reversed(range(len(runner.layout.blocks))):
        hidden = boundaries[index].detach().requires_grad_()
        output = runner.run_block(index, runner.load_block(index), hidden, {"input_ids": tokens})
        (gradient,) = torch.autograd.grad(output, hidden, gradient)
        assert captured[index].grad is not None
        torch.testing.assert_close(gradient, captured[index].grad, rtol=1e-5, atol=1e-6)


def test_weights_are_let_go_of(checkpoint: Path) -> None:
    runner = runner_of(checkpoint)
    streamed(runner, random_tokens(1, 8))
    assert all(parameter.is_meta for parameter in runner.meta_model.model.parameters())
    assert all(parameter.is_meta for layer in runner.meta_model.layers for parameter in layer.parameters())


def test_layout_holds_every_tensor_once(checkpoint: Path) -> None:
    source = Checkpoint(Store(checkpoint))
    _, layout = build_layout(source)
    named = [*layout.embedding, *(name for block in layout.blocks for name in block.tensors)]
    assert set(named) | set(layout.head) == set(source.tensors)
    assert len(named) == len(set(named))
    assert not layout.guesses
    matrices = {name.removesuffix(".weight") for name, info in source.tensors.items() if len(info.shape) > 1}
    quantizable = {name for linear in layout.linears() for name in linear.names}
    assert quantizable == matrices - layout.ignored.keys()
    assert layout.ignored.keys() == {"model.embed_tokens", "lm_head"}


def test_fused_groups_are_those_of_the_runtime(checkpoint: Path) -> None:
    _, layout = build_layout(Checkpoint(Store(checkpoint)))
    found = {group.name: [item.name.rpartition(".")[2] for item in group.linears] for group in layout.blocks[1].groups}
    assert found == {
        "model.layers.1.self_attn.qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "model.layers.1.self_attn.o_proj": ["o_proj"],
        "model.layers.1.mlp.gate_up_proj": ["gate_proj", "up_proj"],
        "model.layers.1.mlp.down_proj": ["down_proj"],
    }


def test_a_wrong_fused_rule_is_found_by_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of("LlamaForCausalLM")
    assert family is not None
    wrong = replace(family, fused=(FusedRule(name="qo_proj", members=("q_proj", "o_proj")),))
    monkeypatch.setattr("prismaquant_ray.model.layout_builder.family_of", lambda _: wrong)
    runner = runner_of(make_checkpoint(tmp_path / "m", "llama"))
    block = runner.layout.blocks[0]
    assert [linear.name.rpartition(".")[2] for linear in block.groups[0].linears] == ["q_proj", "o_proj"]
    module = runner.load_block(0)
    hidden, inputs = torch.zeros(1, 4, runner.layout.hidden_size), {"input_ids": random_tokens(1, 4)}
    with torch.no_grad():
        runner.run_block(0, module, hidden, inputs)
        with pytest.raises(InputError, match=r"o_proj\S* does not read the tensor"), capture_activations(module, block):
            runner.run_block(0, module, hidden, inputs)
        # Nothing is left of the hooks.
        runner.run_block(0, module, hidden, inputs)


def test_an_unknown_architecture_takes_the_generic_path_and_says_what_it_guessed(tmp_path: Path) -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    StableLmForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    _, layout = build_layout(Checkpoint(Store(tmp_path / "m")))
    assert layout.family == "generic"
    assert any("model.layers" in fact for fact in layout.facts)
    assert layout.guesses == ()
    tokens = random_tokens(1, 16) % 64
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(streamed(runner_of(tmp_path / "m"), tokens)[1], whole(tokens).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such_model"}, "does not know model_type 'no_such_model'"),
        ({"intermediate_size": 96}, "the configuration says"),
        ({"num_hidden_layers": 3}, r"model.layers.2\S* is missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, "already quantized"),
        ({"architectures": []}, "names no architecture"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    import json

    directory = make_checkpoint(tmp_path / "m", "llama")
    (directory / "config.json").write_text(json.dumps({**read_config(directory), **change}))
    with pytest.raises(InputError, match=message):
        build_layout(Checkpoint(Store(directory)))


def test_a_nan_weight_is_named_when_its_block_is_loaded(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_checkpoint(tmp_path / "m", "llama")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    copy = tmp_path / "nan"
    shutil.copytree(directory, copy)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    runner = runner_of(copy)
    runner.load_block(0)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight holds 1 NaN"):
        runner.load_block(1)


def test_a_model_without_a_list_of_layers_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bare = BertModel(config)
    bare.encoder.layer = torch.nn.Identity()
    with pytest.raises(InputError, match="no list of layers"):
        decoder_layers(bare, config)
    config.is_encoder_decoder = True
    with pytest.raises(InputError, match="has an encoder before its decoder"):
        decoder_layers(bare, config)
    # GPT-2 has layers, but none of its matrices is a Linear.
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="no Linear that could be quantized"):
        build_layout(Checkpoint(Store(tmp_path / "m")))


def test_older_rotary_settings_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """Configurations from before transformers 5 keep rope_theta and rope_scaling at the top level."""
    import json

    from transformers import AutoConfig

    directory = make_checkpoint(tmp_path / "m", "llama")
    config = read_config(directory)
    del config["rope_parameters"]
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config |= {"rope_theta": 500000.0, "rope_scaling": {**scaling, "original_max_position_embeddings": 32}}
    (directory / "config.json").write_text(json.dumps(config))
    ours = transformers_config(Checkpoint(Store(directory)))
    assert ours.to_dict() == {**AutoConfig.from_pretrained(directory).to_dict(), "_name_or_path": ours.name_or_path}
    tokens = random_tokens(1, 48)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(streamed(runner_of(directory), tokens)[1], whole(tokens).logits)


def test_a_linear_fused_with_one_that_stays_stays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = replace(family_of("LlamaForCausalLM"), ignored=(("k_proj", "for the test"),))
    monkeypatch.setattr(layout_builder, "family_of", lambda _: family)
    _, layout = build_layout(Checkpoint(Store(make_checkpoint(tmp_path / "m", "llama"))))
    assert "qkv_proj" not in {group.name.rpartition(".")[2] for group in layout.groups}
    assert layout.ignored["model.layers.0.self_attn.q_proj"] == (
        "the runtime fuses it with self_attn.k_proj, which stays"
    )
    assert layout.ignored["model.layers.0.self_attn.k_proj"] == "for the test"
