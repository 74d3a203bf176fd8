"""Tiny random Hugging Face checkpoints and pseudo-English text, made without the network.

The weights are drawn so that a model behaves like a model: rows differ in scale, norms and biases are not trivial,
every layer matters, and logits have a standard deviation of about two.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# architecture: (config class, model class, embeddings tied by default)
MODELS: dict[str, tuple[Any, Any, bool]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, True),
    "llama_untied": (LlamaConfig, LlamaForCausalLM, False),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, True),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, False),
    "gemma": (GemmaConfig, GemmaForCausalLM, True),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, True),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, True),
}
ARCHITECTURES = tuple(MODELS)

VOCABULARY = 320
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
LOGIT_STD = 2.0

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
_WORDS = {
    "determiner": "the a one this that every our their some another",
    "adjective": "old quiet heavy bright patient narrow sudden careful northern distant hollow open",
    "noun": "river engine letter garden captain window market teacher bridge machine harbour question number",
    "verb": "carried followed answered measured crossed opened remembered built turned counted watched",
    "adverb": "slowly again twice together never before quietly almost at once in the evening",
    "joint": "and while because although before until so",
}


def make_checkpoint(
    directory: Path,
    architecture: str,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 160,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    tied: bool | None = None,
    shards: int = 1,
    **config: Any,
) -> Path:
    """Write a random BF16 checkpoint with its tokenizer into `directory`; equal arguments give equal bytes.

    `tied=None` keeps the architecture's own habit; further keywords go to its configuration class.
    """
    config_class, model_class, tied_by_default = MODELS[architecture]
    arguments = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": tied_by_default if tied is None else tied,
        "dtype": torch.bfloat16,
    }
    if architecture in {"gemma2", "gemma3_text"}:
        arguments["query_pre_attn_scalar"] = head_dim
        arguments["sliding_window"] = 24
        arguments["layer_types"] = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    model = model_class(config_class(**arguments | config))
    _randomise(model, seed)
    model.to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=_shard_size(model, shards))
    tokenizer().save_pretrained(directory)
    return directory


def make_text(directory: Path, characters: int, *, seed: int = 0) -> Path:
    """Write `characters` characters of pseudo-English prose to `directory/text.txt`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "text.txt"
    path.write_text(_prose(characters, seed), encoding="utf-8")
    return path


def random_tokens(sequences: int, length: int, *, seed: int = 0) -> Tensor:
    """Token ids (sequences, length) of ordinary tokens only."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCABULARY, (sequences, length), generator=generator)


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter, then scale the final norm until logits have a standard deviation of `LOGIT_STD`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # Gemma multiplies embeddings by sqrt(hidden), so its residual stream starts larger and its layers must keep up.
    loudness = 4.0 if model.config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * normal(*parameter.shape))
            elif parameter.dim() == 1:
                parameter.add_(0.2 * normal(*parameter.shape))
                # Where Gemma norms a layer's output, that norm sets its size.
                if _norms_its_outputs(model) and "post_" in name:
                    parameter.add_(loudness - 1)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.25 * normal(*parameter.shape))
            else:
                rows, columns = parameter.shape
                gain = loudness if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                row_scale = torch.exp(0.3 * normal(rows, 1))
                parameter.copy_(gain * row_scale * normal(rows, columns) / columns**0.5)
        _scale_final_norm(model)


def _norms_its_outputs(model: PreTrainedModel) -> bool:
    return model.config.model_type in {"gemma2", "gemma3_text"}


def _scale_final_norm(model: PreTrainedModel) -> None:
    norm = model.model.norm.weight
    # Gemma's norms multiply by 1 + weight.
    offset = 1.0 if model.config.model_type.startswith("gemma") else 0.0
    for _ in range(3):  # Gemma 2 caps its logits softly, which makes the map slightly nonlinear
        std = model.eval()(random_tokens(4, 64)).logits.float().std()
        norm.copy_((norm + offset) * (LOGIT_STD / std) - offset)


def _shard_size(model: PreTrainedModel, shards: int) -> int:
    """The smallest `max_shard_size` in bytes that splits the model into `shards` files."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    total = sum(tensor.nbytes for tensor in state.values())
    if shards == 1:
        return total
    for size in range(total // shards, total, 256):
        if len(split_torch_state_dict_into_shards(state, max_shard_size=size).filename_to_tensors) == shards:
            return size
    raise AssertionError(f"{shards} shards cannot be cut from {len(state)} tensors")


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `VOCABULARY` tokens, trained on the pseudo-English prose."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_prose(20_000, 0)], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _prose(characters: int, seed: int) -> str:
    choose = random.Random(seed)

    def clause() -> str:
        pattern = choose.choice(
            ("determiner noun verb determiner adjective noun", "determiner adjective noun verb determiner noun adverb")
        )
        return " ".join(choose.choice(_WORDS[kind].split()) for kind in pattern.split())

    def sentence() -> str:
        text = clause()
        if choose.random() < 0.5:
            text += f", {choose.choice(_WORDS['joint'].split())} {clause()}"
        if choose.random() < 0.1:
            text += f" in {choose.randrange(1700, 2100)}"
        return text[0].upper() + text[1:] + choose.choice("...?")

    parts: list[str] = []
    length = 0
    while length < characters:
        part = sentence() + ("\n\n" if choose.random() < 0.2 else " ")
        parts.append(part)
        length += len(part)
    return "".join(parts)[:characters]


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint."""
    parsed: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return parsed
