"""Opening the source model, and tokenizing text and images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.messages import Evaluation, WorkerSpec
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.files import loading
from prismaquant_ray.calibration.text import load_sequences
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint
from prismaquant_ray.settings.data import CalibrationConfig, EvaluationConfig
from prismaquant_ray.settings.model import ModelConfig
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.source.resolve import local_files, on_hub, pinned, resolve
from prismaquant_ray.storage.connection import absolute
from prismaquant_ray.storage.store import Store

_LOG = logging.getLogger(__name__)


def open_source(model: ModelConfig, *, weights: bool = True, say: Callable[[str], None] | None = None) -> TensorSource:
    """The checkpoint, as given or from the hub. Without `weights` a directory with only a configuration is accepted.

    `say` hears how a model of the hub is read, where that is not by byte ranges; without it that is logged.
    """
    store = resolve(model.source, model.revision, say or _LOG.warning)
    if isinstance(store, Store) and store.path is None:
        store.check_readable()
    if not weights and ConfigOnlyCheckpoint.fits(store):
        return ConfigOnlyCheckpoint(store)
    return Checkpoint(store)


def worker_spec(
    config: Config, source: TensorSource, run: str | Path, evaluation: Evaluation | None = None
) -> WorkerSpec:
    """What workers are told: places for any working directory, and of a hub id the commit that was opened here."""
    model = config.model
    return WorkerSpec(
        name="",
        config=config,
        source=model.source if on_hub(model.source) else absolute(model.source),
        revision=pinned(model.source, model.revision, source.store),
        run=absolute(run),
        evaluation=evaluation,
    )


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
