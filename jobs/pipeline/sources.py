"""Opening the source model, and tokenizing text and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.files import loading
from prismaquant_ray.calibration.text import load_sequences
from prismaquant_ray.errors import InputError
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint
from prismaquant_ray.settings.data import CalibrationConfig, EvaluationConfig
from prismaquant_ray.settings.model import ModelConfig
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.source.resolve import local_files, resolve
from prismaquant_ray.storage.connection import absolute


def open_source(model: ModelConfig, *, weights: bool = True) -> TensorSource:
    """The checkpoint, as given or from the hub. Without `weights` a directory with only a configuration is accepted."""
    store = resolve(model.source, model.revision)
    if store.path is None:
        store.check_readable()
    if not weights and ConfigOnlyCheckpoint.fits(store):
        return ConfigOnlyCheckpoint(store)
    return Checkpoint(store)


def absolute_source(model: ModelConfig) -> str:
    """`model.source` as an absolute place; a hub id is unchanged, because each node has its own cache."""
    return absolute(model.source) if "://" in model.source or Path(model.source).is_dir() else model.source


def load_tokenizer(source: TensorSource, directory: str | Path) -> Any:
    """The model's tokenizer, from a directory with its files.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    uri = source.store.uri
    with loading(lambda error: f"{uri}: no tokenizer can be loaded ({' '.join(str(error).split())[:200]})"):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def load_tokens(
    source: TensorSource,
    layout: Layout,
    data: CalibrationConfig | EvaluationConfig,
    *,
    seed: int,
    holdout: float = 0.0,
) -> CalibrationSet:
    """Texts and images of calibration or evaluation, prepared by the model's own tokenizer and processor.

    Raises:
        InputError: the text is too short, or an input cannot be read.
    """
    with local_files(source) as directory:
        tokenizer = load_tokenizer(source, directory)
        texts = load_sequences(
            data.text, tokenizer, sequences=data.sequences, length=data.length, seed=seed, holdout=holdout
        )
        largest = int(texts.tokens.max())
        if largest >= layout.vocab_size:
            raise InputError(
                f"{source.store.uri}: the tokenizer makes token {largest} ({tokenizer.decode([largest])!r}), the "
                f"embedding has {layout.vocab_size} rows; tokenizer and weights do not belong together"
            )
        if data.images is None:
            return texts
        from prismaquant_ray.calibration.images import load_images

        assert layout.image_token is not None
        found = load_images(data.images, directory, image_token=layout.image_token)
        return texts.with_images((image.inputs for image in found), holdout)
