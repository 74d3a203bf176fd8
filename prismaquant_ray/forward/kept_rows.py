"""A few rows of an input, kept until a block is finished: what rounding does to activations is tried on them."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows that are kept of an input, and at most of one sequence.
ROWS, OF_SEQUENCE = 512, 128


class KeptRows:
    """The first rows of an input (I,) while microbatches arrive, of sequences that are held out and of others.

    What is kept does not depend on how sequences are cut into microbatches.
    """

    def __init__(self) -> None:
        self._rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._count = [0, 0]

    def add(self, given: tuple[Tensor, Tensor], tokens: int) -> None:
        """The rows (sequences · tokens, I) of a microbatch that are not held out, and those that are."""
        step = -(-tokens // OF_SEQUENCE)
        for place, rows in enumerate(given):
            sequences = -(-(ROWS - self._count[place]) // -(-tokens // step))
            if sequences > 0 and len(rows):
                spaced = rows.unflatten(0, (-1, tokens))[:sequences, ::step]
                self._rows[place].append(spaced.clone().flatten(0, 1))
                self._count[place] += len(self._rows[place][-1])

    def rows(self) -> Tensor:
        """Rows (N, I) float32 that were held out, or others where none was."""
        others, held = self._rows
        return torch.cat(held or others)[:ROWS].float()


def spaced(count: int, rows: int = ROWS) -> slice:
    """At most so many of `count` places, evenly spaced."""
    return slice(0, count, max(1, -(-count // rows)))
