"""The tiny checkpoints other tests rely on are real Hugging Face checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import ARCHITECTURES, VOCABULARY, make_checkpoint, make_text, random_tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_it_completely_and_its_logits_vary(architecture: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, architecture)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (tmp_path / "generation_config.json").is_file()
    with torch.no_grad():
        tokens = random_tokens(4, 64, seed=7)
        logits = model(tokens).logits.float()
    assert 1 < logits.std() < 3
    assert (logits.argmax(-1) == tokens).float().mean() < 0.5  # the layers decide, not the embedding alone


@pytest.mark.parametrize(("architecture", "shards"), [("llama", 2), ("llama_untied", 3)])
def test_shards_hold_the_same_tensors_as_one_file(architecture: str, shards: int, tmp_path: Path) -> None:
    whole = load_file(make_checkpoint(tmp_path / "whole", architecture) / "model.safetensors")
    split = make_checkpoint(tmp_path / "split", architecture, shards=shards)
    files = sorted(split.glob("*.safetensors"))
    assert len(files) == shards
    assert (split / "model.safetensors.index.json").is_file()
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    first, again, other = (
        (make_checkpoint(tmp_path / name, "llama", seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again != other


@pytest.mark.parametrize("tied", [True, False])
def test_tying_can_be_chosen(tied: bool, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gemma3_text", tied=tied)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


def test_the_tokenizer_round_trips(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint(tmp_path, "llama"))
    text = "The river crossed 1,204 bridges — naïve 東京 🚢\n\n  twice."
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<s>user\nHi</s>\n"


def test_text_has_the_length_asked_for(tmp_path: Path) -> None:
    text = make_text(tmp_path, 5000).read_text()
    assert len(text) == 5000
    assert len(set(text.split())) > 50
