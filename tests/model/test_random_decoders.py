"""Random small decoders, laid out as checkpoints are found: the logits of transformers, and a job within its budget."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jobs.pipeline.assembly import verify
from prismaquant_ray.source.files import INDEX, SINGLE
from tests.architectures import VOCABULARY, Architecture, make_architecture
from tests.model.test_models import runner_of, streamed
from tests.runs import configuration, measured, quantized

_BOOL = st.booleans()
# Among them widths that not every format takes.
_WIDTH = st.sampled_from([24, 32, 40, 48, 52, 64, 80, 96, 100, 128])
_HEAD = {"head_dim": st.sampled_from([8, 12, 16, 20, 24, 32])}
_BIAS = {"attention_bias": _BOOL}
_BIASES = {**_BIAS, "mlp_bias": _BOOL}
_WINDOW = {"sliding_window": st.just(8)}
_SCALED = {"query_pre_attn_scalar": st.integers(8, 64)}
_MULTIPLIERS = {
    "embedding_multiplier": st.just(3.0),
    "residual_multiplier": st.just(0.5),
    "logits_scaling": st.just(2.0),
}
_CHOSEN = {"num_experts_per_tok": st.integers(1, 2)}
_EXPERTS = {"num_experts": st.integers(2, 5), **_CHOSEN}
_LOCAL_EXPERTS = {"num_local_experts": st.integers(2, 5), **_CHOSEN}
_SPARSE = {
    **_EXPERTS,
    "moe_intermediate_size": _WIDTH,
    "decoder_sparse_step": st.integers(1, 2),
    "mlp_only_layers": st.sampled_from([[], [0]]),
    "norm_topk_prob": _BOOL,
}

#: Settings of each class beside the usual ones.
_CLASSES: Mapping[str, Mapping[str, st.SearchStrategy[Any]]] = {
    "LlamaForCausalLM": {**_HEAD, **_BIASES},
    "MistralForCausalLM": {**_HEAD, **_WINDOW},
    "Qwen2ForCausalLM": {**_WINDOW, "use_sliding_window": _BOOL, "max_window_layers": st.just(1)},
    "Qwen3ForCausalLM": {**_HEAD, **_BIAS},
    "GemmaForCausalLM": {**_HEAD, **_BIAS},
    "Gemma2ForCausalLM": {**_HEAD, **_BIAS, **_WINDOW, **_SCALED},
    "Gemma3ForCausalLM": {**_HEAD, **_BIAS, **_WINDOW, **_SCALED},
    "Qwen3MoeForCausalLM": {**_HEAD, **_BIAS, **_SPARSE},
    "MixtralForCausalLM": {**_HEAD, **_LOCAL_EXPERTS},
    # Without a family:
    "ApertusForCausalLM": _BIAS,
    "ArceeForCausalLM": {**_HEAD, **_BIASES},
    "CohereForCausalLM": {**_BIAS, "use_qk_norm": _BOOL},
    "Cohere2ForCausalLM": {**_BIAS, **_WINDOW},
    "CwmForCausalLM": {**_HEAD, **_WINDOW, "mlp_bias": _BOOL},
    "DogeForCausalLM": _BIASES,
    "Ernie4_5ForCausalLM": {**_HEAD, "use_bias": _BOOL},
    "Exaone4ForCausalLM": _WINDOW,
    "GlmForCausalLM": {**_HEAD, **_BIAS},
    "Glm4ForCausalLM": {**_HEAD, **_BIAS},
    "GraniteForCausalLM": {**_BIASES, **_MULTIPLIERS},
    "HunYuanDenseV1ForCausalLM": {**_HEAD, **_BIAS},
    "Jais2ForCausalLM": {**_HEAD, **_BIASES},
    "Lfm2ForCausalLM": {"conv_bias": _BOOL, "block_auto_adjust_ff_dim": _BOOL},
    "MinistralForCausalLM": {**_HEAD, **_WINDOW},
    "NemotronForCausalLM": {**_HEAD, **_BIASES},
    "OlmoForCausalLM": {**_BIAS, "clip_qkv": st.sampled_from([None, 0.5])},
    "Olmo2ForCausalLM": _BIAS,
    "Olmo3ForCausalLM": {**_BIAS, **_WINDOW},
    "PersimmonForCausalLM": {"qk_layernorm": _BOOL},
    "PhiForCausalLM": {"qk_layernorm": _BOOL},
    "Phi3ForCausalLM": _WINDOW,
    "SeedOssForCausalLM": {**_HEAD, **_BIASES, "attention_out_bias": _BOOL},
    "SmolLM3ForCausalLM": _BIASES,
    "StableLmForCausalLM": {"use_qkv_bias": _BOOL, "qk_layernorm": _BOOL, "use_parallel_residual": _BOOL},
    "Starcoder2ForCausalLM": {"use_bias": _BOOL},
    "VaultGemmaForCausalLM": {**_HEAD, **_BIAS, **_WINDOW, **_SCALED},
    "GraniteMoeForCausalLM": {**_BIAS, **_MULTIPLIERS, **_LOCAL_EXPERTS},
    "FlexOlmoForCausalLM": {**_EXPERTS, **_BIAS, "norm_topk_prob": _BOOL},
    # Its router knows two choices only.
    "PhimoeForCausalLM": {**_BIAS, **_LOCAL_EXPERTS, "lm_head_bias": _BOOL, "num_experts_per_tok": st.just(2)},
    "Dots1ForCausalLM": {
        **_BIAS,
        **_CHOSEN,
        "moe_intermediate_size": _WIDTH,
        "first_k_dense_replace": st.integers(0, 2),
        "n_shared_experts": st.integers(1, 2),
        "n_routed_experts": st.sampled_from([4, 8]),
        "n_group": st.integers(1, 2),
        "topk_group": st.just(1),
    },
    "OlmoeForCausalLM": {**_EXPERTS, **_BIAS, "norm_topk_prob": _BOOL},
    "Qwen2MoeForCausalLM": {**_SPARSE, "shared_expert_intermediate_size": _WIDTH, "qkv_bias": _BOOL},
}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "mixed": torch.bfloat16}
_ROUTERS = {"gate", "router", "shared_expert_gate"}


class Decoder(NamedTuple):
    """A checkpoint: its model, the type of its weights, what its names begin with, and in how many files it is.

    `head` is whether an output head that is tied to the embedding is stored beside it.
    """

    architecture: Architecture
    dtype: str
    prefixed: bool
    head: bool
    shards: int
    indexed: bool

    @property
    def tied(self) -> bool:
        return bool(self.architecture.config["tie_word_embeddings"])


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, most + 1) if number % each == 0]


@st.composite
def decoders(draw: st.DrawFn) -> Decoder:
    name = draw(st.sampled_from(sorted(_CLASSES)))
    choices = _CLASSES[name]
    hidden = 32 * draw(st.integers(2, 4))
    heads = draw(st.sampled_from(_divisors(hidden, 4)))
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": draw(_WIDTH),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from(_divisors(heads, heads))),
        "max_position_embeddings": 256,
        "tie_word_embeddings": draw(_BOOL),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Decoder(
        Architecture(name, {**config, **{key: draw(choice) for key, choice in choices.items()}}),
        dtype=draw(st.sampled_from(sorted(_DTYPES))),
        prefixed=draw(_BOOL),
        head=draw(_BOOL),
        shards=draw(st.integers(1, 3)),
        indexed=draw(_BOOL),
    )


@contextmanager
def stored(decoder: Decoder) -> Iterator[Path]:
    """The checkpoint, with an index wherever it has shards, which transformers asks for."""
    with tempfile.TemporaryDirectory() as directory:
        source = make_architecture(Path(directory) / "source", decoder.architecture)
        tensors = retyped(load_file(source / SINGLE), decoder.dtype)
        if decoder.tied and decoder.head:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if decoder.dtype != "mixed":
            config = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps({**config, "dtype": decoder.dtype}))
        if not decoder.prefixed:
            tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        if decoder.shards == 1:
            save_file(tensors, source / SINGLE, {"format": "pt"})
        else:
            (source / SINGLE).unlink()
            save_shards(source, tensors, decoder.shards)
        yield source


def retyped(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors in another type, with numbers that BF16 does not have where the type has them."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, tensor in tensors.items():
        kind = torch.float32 if dtype == "mixed" and "norm" in name else _DTYPES[dtype]
        found[name] = (tensor.float() * (1 + 0.2 * torch.rand(tensor.shape, generator=generator))).to(kind)
    return found


def save_shards(source: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    """Tensors of a layer, and of a fused group, are in different files."""
    names = sorted(tensors)
    random.Random(0).shuffle(names)
    placed: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, source / file, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def lose_index(decoder: Decoder, source: Path) -> None:
    if not decoder.indexed:
        (source / INDEX).unlink(missing_ok=True)


def narrow(model: nn.Module) -> None:
    """Round the matrices that are read as BF16 where they have 32 bits."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and _ROUTERS.isdisjoint(name.split(".")) and "norm" not in name:
            parameter.copy_(parameter.bfloat16())


@settings(max_examples=40)
@given(decoder=decoders(), seed=st.integers(0, 1000))
def test_blocks_one_by_one_give_the_logits_of_transformers(decoder: Decoder, seed: int) -> None:
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(seed))
    with stored(decoder) as source, torch.no_grad():
        model_class = getattr(transformers, decoder.architecture.name)
        whole, loading = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        assert not any(loading.values())
        if decoder.dtype in ("float32", "mixed"):
            narrow(whole)
        lose_index(decoder, source)
        found = streamed(runner_of(source), tokens)[1]
        # Experts are summed in another order.
        torch.testing.assert_close(found, whole(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@settings(max_examples=8)
@given(decoder=decoders(), share=st.floats(0, 1))
def test_a_whole_job_verifies_and_keeps_any_budget_from_the_smallest_plan_on(decoder: Decoder, share: float) -> None:
    fast = ("rounding.gptq=null", "rounding.scale_search.grid=2", "calibration.sequences=4")
    with stored(decoder) as source:
        lose_index(decoder, source)
        sizes = measured(configuration(source.parent, source, *fast, bpp=16.0)).measured().sizes
        least = 8 * sizes.weights.min(axis=1, where=sizes.allowed, initial=1 << 60).sum() / sizes.parameters
        bpp = min(16.0, math.ceil(1e4 * (least + share * (16 - least))) / 1e4)
        config = configuration(source.parent, source, *fast, bpp=bpp)
        quantized(config)
        found = verify(config)
        assert found.ok, found.problems
        assert found.bpp <= bpp
