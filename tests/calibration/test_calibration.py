"""Claims about calibration text: what is drawn, what is held out, and what is refused."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.text import load_sequences
from prismaquant_ray.errors import InputError
from tests.tiny import make_checkpoint, make_text

ROOT = Path(__file__).parents[2]
CALIBRATION = ROOT / "configs/data/calibration.txt"
EVALUATION = ROOT / "configs/data/evaluation.txt"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), 8000)


def draw(text: Path | str, tokenizer: PreTrainedTokenizerBase, **changed: Any) -> CalibrationSet:
    return load_sequences(text, tokenizer, **{"sequences": 12, "length": 32, "seed": 0, "holdout": 0.25} | changed)


def test_equal_arguments_draw_equal_sequences(text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, as_text = (draw(source, tokenizer) for source in (text, text, text.read_text()))
    assert first.tokens.shape == (12, 32)
    assert first.tokens.dtype == torch.long
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.holdout, again.holdout)
    assert first.fingerprint == again.fingerprint == as_text.fingerprint


def test_the_fingerprint_changes_with_seed_and_shape(text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prints = [
        draw(text, tokenizer, **changed).fingerprint
        for changed in ({}, {"seed": 1}, {"sequences": 13}, {"length": 31}, {"sequences": 6, "length": 64})
    ]
    assert len(set(prints)) == len(prints)


def test_sequences_are_disjoint_windows_of_the_text(text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    everything = draw(text, tokenizer, sequences=len(windows)).tokens.tolist()
    assert sorted(everything) == sorted(windows)


def test_a_smaller_set_begins_a_larger_one(text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    small, large = (draw(text, tokenizer, sequences=count).tokens for count in (5, 20))
    assert torch.equal(small, large[:5])


@given(sequences=st.integers(2, 300), share=st.floats(0, 0.99))
def test_holdout_is_spread_evenly(tokenizer: PreTrainedTokenizerBase, sequences: int, share: float) -> None:
    held = draw("ab" * sequences, tokenizer, sequences=sequences, length=1, holdout=share).holdout
    count = int(held.sum())
    assert (count > 0) == (share > 0)
    assert count < sequences
    assert abs(count - share * sequences) <= 1
    gaps = held.nonzero().flatten().diff()
    assert count < 2 or int(gaps.max()) - int(gaps.min()) <= 1


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_microbatches_cover_every_sequence_once(size: int, text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = draw(text, tokenizer)
    batches = drawn.batches(size)
    assert all(1 <= len(batch.tokens) <= size for batch in batches)
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), drawn.tokens)
    assert torch.equal(torch.cat([batch.holdout for batch in batches]), drawn.holdout)
    for batch in batches:
        assert list(batch.inputs) == ["input_ids"]
        assert torch.equal(batch.tokens, drawn.tokens[batch.first_sequence :][: len(batch.tokens)])


def images(*lengths: int) -> list[dict[str, Tensor]]:
    """What a processor might make of images, with so many tokens."""
    return [
        {
            "input_ids": torch.full((1, length), number),
            "pixel_values": torch.full((4 * length, 6), number / 3),
            "image_grid_thw": torch.tensor([[1, 4, length]]),
        }
        for number, length in enumerate(lengths)
    ]


def test_images_are_microbatches_of_their_own_behind_the_texts(text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = draw(text, tokenizer)
    added = images(7, 3, 5)
    drawn = texts.with_images(added, 0.3)
    assert (drawn.texts, drawn.positions) == (12, 12 * 32 + 7 + 3 + 5)
    assert drawn.holdout.shape == (15,)
    assert torch.equal(drawn.holdout[:12], texts.holdout)
    assert drawn.holdout[12:].tolist() == [False, True, False]
    batches = drawn.batches(5)
    assert [len(batch.tokens) for batch in batches] == [5, 5, 2, 1, 1, 1]
    for number, (batch, image) in enumerate(zip(batches[3:], added, strict=True)):
        assert batch.inputs.keys() == image.keys()
        assert all(torch.equal(batch.inputs[name], tensor) for name, tensor in image.items())
        assert batch.first_sequence == 12 + number
        assert torch.equal(batch.holdout, drawn.holdout[12 + number : 13 + number])


def test_a_stored_set_is_read_again_as_it_was(text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # More than ten images: their order is not that of their names.
    drawn = draw(text, tokenizer).with_images(images(*range(2, 14)), 0.25)
    again = CalibrationSet.of_state(dict(sorted(drawn.state().items())))
    assert again.fingerprint == drawn.fingerprint
    assert torch.equal(again.holdout, drawn.holdout)
    for left, right in zip(again.batches(4), drawn.batches(4), strict=True):
        assert left.first_sequence == right.first_sequence
        assert left.inputs.keys() == right.inputs.keys()
        assert all(torch.equal(left.inputs[name], tensor) for name, tensor in right.inputs.items())


def test_the_fingerprint_changes_with_every_image_and_their_order(
    text: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = draw(text, tokenizer)
    one, two = images(4, 4)
    brighter = {**one, "pixel_values": one["pixel_values"] + 0.5}
    sets = [[], [one], [two], [one, two], [two, one], [brighter], [{**one, "more": torch.zeros(1)}]]
    prints = [texts.with_images(images_, 0.0).fingerprint for images_ in sets]
    assert len(set(prints)) == len(prints)
    assert prints[0] == texts.fingerprint


def test_a_text_that_just_suffices_is_taken_and_one_token_less_is_refused(
    text: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokens = len(tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    assert draw(text, tokenizer, sequences=1, length=tokens, holdout=0.0).tokens.shape == (1, tokens)
    with pytest.raises(InputError, match=rf"has {tokens:,} tokens, 1 sequences × {tokens + 1:,} asked; use fewer"):
        draw(text, tokenizer, sequences=1, length=tokens + 1)


def test_unreadable_files_are_named_in_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for name, reason in (("absent.txt", "No such file"), ("latin.txt", "not UTF-8"), (".", "Is a directory")):
        with pytest.raises(InputError, match=reason) as caught:
            draw(tmp_path / name, tokenizer)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_text_longer_than_the_context_draws_no_warning(text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    fresh = copy.deepcopy(tokenizer)  # a tokenizer warns once in its life
    fresh.deprecation_warnings.clear()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        drawn = draw(text, fresh)
    finally:
        logger.removeHandler(handler)
    assert drawn.tokens.max() < len(tokenizer)
    assert records == []


def test_evaluation_text_shares_no_passage_with_calibration_text() -> None:
    calibration, evaluation = (" ".join(path.read_text("utf-8").split()) for path in (CALIBRATION, EVALUATION))
    seen = {calibration[start : start + 60] for start in range(len(calibration) - 59)}
    assert not any(evaluation[start : start + 60] in seen for start in range(len(evaluation) - 59))


def test_a_tokenizer_that_begins_with_bos_gets_it_in_every_sequence(tmp_path: Path, text: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint(tmp_path / "m", "gemma"))
    plain = draw(text, tokenizer, sequences=4, length=16)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
    )
    begun = draw(text, tokenizer, sequences=4, length=16)
    assert begun.tokens.shape == (4, 16)
    assert (begun.tokens[:, 0] == bos).all()
    assert not (begun.tokens[:, 1:] == bos).any()
    assert not (plain.tokens == bos).any()
