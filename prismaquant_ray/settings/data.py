"""The data that a model is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from prismaquant_ray.settings.texts import MIX_ALL, Texts, TextSource
from prismaquant_ray.settings.values import Section

_MIX = (TextSource(path=MIX_ALL),)


class CalibrationConfig(Section):
    """The text that is run through the model to measure it."""

    text: Texts = Field(
        default=_MIX,
        description="Text like what the model will read and write: one source or several, see docs/calibration.md.",
    )
    images: Path | None = Field(
        default=None, description="JSONL file of images with captions. Without it a vision tower stays in BF16."
    )
    sequences: int = Field(default=128, ge=2, description="Number of sequences.")
    length: int = Field(default=1024, ge=2, description="Tokens per sequence.")
    seed: int = Field(default=0, ge=0, description="Seed of the choice of sequences and of the sampled labels.")
    holdout: float = Field(
        default=0.125,
        gt=0.0,
        lt=1.0,
        description="Share of the sequences held out to decide, per Linear, whether GPTQ beats searched rounding.",
    )
    microbatch: int = Field(default=4, ge=1, description="Sequences run at once.")
    labels: Literal["sampled", "data"] = Field(
        default="sampled",
        description="Labels of the loss: sampled from the prediction (Fisher) or the text's own (empirical Fisher).",
    )


class EvaluationConfig(Section):
    """The text, unseen by the calibration, on which `quantize` and `sweep --measure` measure the quantized model."""

    text: Texts = Field(
        default=_MIX, description="One source or several; by default the part of the mix that no calibration reads."
    )
    images: Path | None = Field(default=None, description="JSONL file of images with captions.")
    sequences: int = Field(default=24, ge=1, description="Number of sequences.")
    length: int = Field(default=512, ge=2, description="Tokens per sequence.")
