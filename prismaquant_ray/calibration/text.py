"""Calibration sequences cut from one plain text.

The text is taken as it is: no chat template is applied (`rows` does that). A model whose tokenizer begins every text
with a BOS token (Gemma, Llama 3) gets one at the start of every sequence, because it was never trained without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prismaquant_ray.calibration.dataset import CalibrationSet, spread_evenly
from prismaquant_ray.calibration.files import loading, read_text
from prismaquant_ray.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["first_tokens", "load_sequences", "token_ids"]


def load_sequences(
    path_or_text: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int,
    length: int,
    seed: int,
    holdout: float,
    name: str = "The text",
) -> CalibrationSet:
    """Draw `sequences` non-overlapping windows of `length` tokens, BOS included.

    A `Path` is read, a `str` is the text itself, which messages call `name`. The windows keep the order in which they
    are drawn, so with one seed a smaller set is the start of a larger one. `holdout` is the share held out: at least
    one sequence when above zero.

    Raises:
        InputError: the text cannot be read, is not UTF-8, or is too short.
    """
    if isinstance(path_or_text, Path):
        name, text = str(path_or_text), read_text(path_or_text, "The text")
    else:
        text = path_or_text
    ids = token_ids(tokenizer, text, add_special_tokens=False)
    start = first_tokens(tokenizer)
    width = length - len(start)
    windows = len(ids) // width
    if windows < sequences:
        raise InputError(
            f"{name} has {len(ids):,} tokens, {sequences:,} sequences × {length:,} asked; "
            "use fewer or shorter sequences or a longer text."
        )
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(windows)[:sequences]
    text_tokens = torch.tensor(ids[: windows * width], dtype=torch.long).view(windows, width)[torch.from_numpy(chosen)]
    tokens = torch.cat([torch.tensor(start, dtype=torch.long).expand(sequences, -1), text_tokens], dim=1)
    return CalibrationSet(tokens=tokens, holdout=spread_evenly(sequences, holdout))


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS where the tokenizer begins every text with it, else nothing."""
    special = token_ids(tokenizer, "")
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """The tokens of a text; InputError where a tokenizer that could be loaded fails."""

    def refusal(error: Exception) -> str:
        return f"{tokenizer.name_or_path}: its tokenizer cannot be used ({' '.join(str(error).split())[:200]})"

    with loading(refusal):
        # verbose=False: a text longer than the model's context is intended here.
        found: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
        return found
