"""Opening the source model, and tokenizing text and images."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.messages import Evaluation, WorkerSpec
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.files import loading
from prismaquant_ray.calibration.packing import Drawing, load_texts
from prismaquant_ray.calibration.reading import Part, ReadText, TextReader, with_kinds
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.events import TextsRead
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint
from prismaquant_ray.settings.data import CalibrationConfig, EvaluationConfig
from prismaquant_ray.settings.model import ModelConfig
from prismaquant_ray.settings.texts import shares_of
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


def part_of(data: CalibrationConfig | EvaluationConfig) -> Part:
    """Which part of the mix a section reads."""
    return "calibration" if isinstance(data, CalibrationConfig) else "evaluation"


def read_evaluation(data: EvaluationConfig, reader: TextReader) -> str:
    """Everything that its sources hold, as one text."""
    return "\n".join(read.sample for read, _ in _read(data, reader))


def _read(data: CalibrationConfig | EvaluationConfig, reader: TextReader) -> list[tuple[ReadText, float]]:
    """What every source of a section holds, and its share."""
    characters = Drawing(sequences=data.sequences, length=data.length, seed=0).characters
    return [
        (reader.read(text, part_of(data), characters=characters), share)
        for text, share, _ in with_kinds(data.text, shares_of(data.text))
    ]


def text_digest(data: CalibrationConfig | EvaluationConfig, reader: TextReader) -> str:
    """sha256 of the content of a section's sources: of one plain text that of its bytes, whatever its path.

    Raises:
        InputError: a source cannot be read.
    """
    (first, _), *others = found = _read(data, reader)
    if first.plain is not None and not others:
        return first.digest
    known = [["plain" if read.plain is not None else "rows", share, read.digest] for read, share in found]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def texts_read(purpose: str, found: CalibrationSet) -> TextsRead:
    """What listeners and the log are told of a set."""
    return TextsRead(
        purpose=purpose, length=found.tokens.shape[1], sources=found.sources, fingerprint=found.fingerprint
    )


def load_tokens(
    source: TensorSource,
    layout: Layout,
    data: CalibrationConfig | EvaluationConfig,
    reader: TextReader,
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
        drawing = Drawing(sequences=data.sequences, length=data.length, seed=seed)
        texts = load_texts(data.text, part_of(data), reader, tokenizer, drawing, holdout=holdout)
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
