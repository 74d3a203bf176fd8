"""The calibration set: token sequences and images, cut into microbatches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prismaquant_ray.records import TakenText

#: The argument of the model's forward that holds token ids.
TOKENS = "input_ids"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """One microbatch: the keyword arguments of the model's forward, `input_ids` (sequences, tokens) among them.

    `holdout` (sequences,) marks those that judge rounding instead of driving it; `first_sequence` is the index
    of the first one in the calibration set.
    """

    inputs: Mapping[str, Tensor]
    holdout: Tensor
    first_sequence: int

    @property
    def tokens(self) -> Tensor:
        """Token ids (sequences, tokens)."""
        return self.inputs[TOKENS]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibrationSet:
    """Token sequences of equal length, and images each with a sequence of its own; some of both are held out.

    `sources` says what the texts were taken from; they are no part of the fingerprint, nor of the tensors.
    """

    tokens: Tensor  # int64 (sequences of text, length)
    holdout: Tensor  # bool (sequences of text, then images)
    images: tuple[Mapping[str, Tensor], ...] = ()  # the model's inputs, one sequence each
    sources: tuple[TakenText, ...] = ()

    def with_images(self, images: Iterable[Mapping[str, Tensor]], holdout: float) -> CalibrationSet:
        """The same texts, and images; a share of these is held out, too."""
        images = tuple(images)
        held_out = torch.cat([self.holdout, spread_evenly(len(images), holdout)])
        return replace(self, holdout=held_out, images=images)

    @property
    def texts(self) -> int:
        """Sequences of text."""
        return len(self.tokens)

    @property
    def positions(self) -> int:
        """Tokens of all sequences, those that stand for images included."""
        return self.tokens.numel() + sum(inputs[TOKENS].numel() for inputs in self.images)

    @property
    def held_out_positions(self) -> int:
        """Tokens of the sequences that are held out."""
        images = [inputs[TOKENS].numel() for inputs in self.images]
        sizes = torch.tensor([self.tokens.shape[1]] * self.texts + images, dtype=torch.int64)
        return int(sizes[self.holdout].sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every tensor with its name, type and shape."""
        digest = hashlib.sha256()
        for name, tensor in [("tokens", self.tokens), *_named(self.images)]:
            digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def batches(self, size: int) -> tuple[Batch, ...]:
        """Texts by at most `size` sequences, then every image by itself: nothing is padded."""
        texts = [
            Batch(
                inputs={TOKENS: self.tokens[start : start + size]},
                holdout=self.holdout[start : min(start + size, self.texts)],
                first_sequence=start,
            )
            for start in range(0, self.texts, size)
        ]
        images = [
            Batch(inputs=inputs, holdout=self.holdout[index : index + 1], first_sequence=index)
            for index, inputs in enumerate(self.images, start=self.texts)
        ]
        return (*texts, *images)

    def state(self) -> dict[str, Tensor]:
        """Everything as named tensors, to be stored."""
        return {"tokens": self.tokens, "holdout": self.holdout, **dict(_named(self.images))}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> CalibrationSet:
        """The inverse of `state`."""
        images: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition("/")
            if kind == "image":
                number, _, argument = rest.partition("/")
                images.setdefault(int(number), {})[argument] = tensor
        return cls(
            tokens=state["tokens"],
            holdout=state["holdout"],
            images=tuple(images[number] for number in sorted(images)),
        )


def spread_evenly(count: int, share: float) -> Tensor:
    """A mask (count,) with `share` of the entries set, at least one, each in the middle of an equal part."""
    mask = torch.zeros(count, dtype=torch.bool)
    if share > 0 and count > 1:
        chosen = max(1, min(round(share * count), count - 1))
        mask[((torch.arange(chosen) + 0.5) * count / chosen).long()] = True
    return mask


def _named(images: tuple[Mapping[str, Tensor], ...]) -> list[tuple[str, Tensor]]:
    return [
        (f"image/{index}/{name}", tensor)
        for index, inputs in enumerate(images)
        for name, tensor in sorted(inputs.items())
    ]
