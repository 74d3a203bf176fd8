"""Sequences of one length, packed from documents of several sources.

Documents follow each other in a sequence, and a long one goes on in the next. Attention does reach across their
boundaries: blocks are run by the model's own code on whole sequences, as they were in training and as servers run
them, and a mask of a block for every sequence would cost the fast attention of all of them. What keeps documents apart
are their own special tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from prismaquant_ray.calibration.dataset import CalibrationSet, spread_evenly
from prismaquant_ray.calibration.reading import Part, ReadText, TextReader, with_kinds
from prismaquant_ray.calibration.rows import document, has_template
from prismaquant_ray.calibration.text import first_tokens, load_sequences
from prismaquant_ray.errors import InputError
from prismaquant_ray.records import TakenText
from prismaquant_ray.settings.texts import MIX, TextSource, shares_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a dataset of the hub so many characters are read for a token that is wanted: some four make one.
_CHARACTERS = 64
# Of rows so many sequences are packed for one that is wanted.
_PACKED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """What is drawn: so many sequences of so many tokens, with a seed."""

    sequences: int
    length: int
    seed: int

    @property
    def characters(self) -> int:
        """How much of a source without an end is read."""
        return self.sequences * self.length * _CHARACTERS


def divide(total: int, shares: Sequence[float]) -> list[int]:
    """`total` in whole parts, each less than 1 from its share of it: the largest remainders are rounded up.

    Of equal remainders the first one is. Shares sum to 1.
    """
    exact = [total * share for share in shares]
    parts = [math.floor(each + 1e-9) for each in exact]
    order = sorted(range(len(parts)), key=lambda place: parts[place] - exact[place])
    for place in order[: total - sum(parts)]:
        parts[place] += 1
    return parts


def packed(documents: Iterable[Sequence[int]], *, length: int, start: Sequence[int]) -> Iterator[list[int]]:
    """Full sequences of `length` tokens. Each begins with `start`, unless a document that does begins there."""
    sequence: list[int] = []
    for tokens in documents:
        position = 0
        while position < len(tokens):
            if not sequence and list(tokens[position : position + len(start)]) != list(start):
                sequence = [*start]
            taken = tokens[position : position + length - len(sequence)]
            sequence += taken
            position += len(taken)
            if len(sequence) == length:
                yield sequence
                sequence = []


def load_texts(
    texts: tuple[TextSource, ...],
    part: Part,
    reader: TextReader,
    tokenizer: PreTrainedTokenizerBase,
    drawing: Drawing,
    *,
    holdout: float,
) -> CalibrationSet:
    """Sequences from every source by its share, in the order of a draw; `holdout` is the share that is held out.

    One plain text gives the windows of `load_sequences`.

    Raises:
        InputError: a source cannot be read, has too few tokens, or its share is less than a sequence.
    """
    sources = with_kinds(texts, shares_of(texts))
    if not has_template(tokenizer):
        # A model without a template never saw a chat.
        without = [entry for entry in sources if not (entry[2] and entry[0].path == f"{MIX}chat")]
        total = math.fsum(share for _, share, _ in without)
        sources = [(text, share / total, optional) for text, share, optional in without]
    counts = divide(drawing.sequences, [share for _, share, _ in sources])
    found: list[Tensor] = []
    taken: list[TakenText] = []
    for (text, share, optional), count in zip(sources, counts, strict=True):
        if not count and not optional:
            raise InputError(
                f"{text.path}: a share of {share:.3g} of {drawing.sequences:,} sequences is none; give it a larger "
                "one, or more sequences"
            )
        if count:
            read = reader.read(text, part, characters=drawing.characters)
            tokens, said = _draw(text.name, read, tokenizer, drawing, count)
            found.append(tokens)
            taken.append(said)
    tokens = torch.cat(found)
    if len(found) > 1:
        order = np.random.Generator(np.random.PCG64(drawing.seed)).permutation(len(tokens))
        tokens = tokens[torch.from_numpy(order)]
    return CalibrationSet(tokens=tokens, holdout=spread_evenly(len(tokens), holdout), sources=tuple(taken))


def _draw(
    name: str, read: ReadText, tokenizer: PreTrainedTokenizerBase, drawing: Drawing, count: int
) -> tuple[Tensor, TakenText]:
    """So many sequences of one source, and what was taken for them."""
    rows = dropped = None
    if read.plain is not None:
        drawn = load_sequences(
            read.plain,
            tokenizer,
            sequences=count,
            length=drawing.length,
            seed=drawing.seed,
            holdout=0.0,
            name=read.name,
        )
        tokens = drawn.tokens
    else:
        tokens, rows, dropped = _draw_rows(read, tokenizer, drawing, count)
    said = TakenText(name=name, sha256=read.digest, sequences=count, tokens=tokens.numel(), rows=rows, dropped=dropped)
    return tokens, said


def _draw_rows(
    read: ReadText, tokenizer: PreTrainedTokenizerBase, drawing: Drawing, count: int
) -> tuple[Tensor, int, int]:
    """Sequences packed from rows in a drawn order, the number of rows read for them, and of those without text.

    More are packed than are wanted and some of them drawn: else a few sequences would be one long document.
    """
    seen = dropped = size = 0

    def documents() -> Iterator[list[int]]:
        nonlocal seen, dropped, size
        for place in np.random.Generator(np.random.PCG64(drawing.seed)).permutation(len(read.rows)):
            where, row = read.rows[place]
            tokens = document(where, row, tokenizer)
            seen, dropped, size = seen + 1, dropped + (not tokens), size + len(tokens)
            yield tokens

    begun = packed(documents(), length=drawing.length, start=first_tokens(tokenizer))
    found = [*islice(begun, count * _PACKED)]
    if len(found) >= count:
        chosen = np.random.Generator(np.random.PCG64(drawing.seed)).permutation(len(found))[:count]
        return torch.tensor(found, dtype=torch.long)[torch.from_numpy(chosen)], seen, dropped
    without = f", {dropped:,} of them empty" if dropped else ""
    raise InputError(
        f"{read.name} has {size:,} tokens in {seen:,} rows{without}, {count:,} sequences × {drawing.length:,} asked; "
        "use fewer or shorter sequences, another share or more text"
    )
