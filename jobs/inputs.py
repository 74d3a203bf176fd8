"""Finding and checking everything a run starts from, before anything expensive."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import psutil

from actors.cluster import joins
from actors.needs import Needs
from prismaquant_ray import __version__
from prismaquant_ray.checkpoint.reader import Checkpoint
from prismaquant_ray.config import Config, ModelConfig
from prismaquant_ray.errors import InputError
from prismaquant_ray.layout import Layout
from prismaquant_ray.models.runner import check_finite
from prismaquant_ray.storage.store import Store


def resolve_source(model: ModelConfig) -> Path:
    """The model's directory: as given, from the hub's cache, or written from the package that embeds it."""
    directory = Path(model.source)
    if model.embedded is not None:
        from prismaquant_ray.models.embedded import materialise

        return materialise(model.embedded, directory)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.source, revision=model.revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"model.source {model.source}: neither a directory nor in the hub's cache (revision {model.revision}); "
            f"give a directory, or fetch it first: hf download {model.source}"
        ) from error


def check_weights(source: Checkpoint, layout: Layout) -> None:
    """InputError naming the first tensor with a NaN or an infinity; one block in memory at a time."""
    for names in (layout.embedding, layout.head, *(block.tensors for block in layout.blocks)):
        for name in names:
            check_finite(source.read([name]), source.store.uri)


def check_room(config: Config, required: Needs) -> None:
    """InputError with the plan's figures when memory or disk cannot hold the run."""
    workers = expected_workers(config)
    free_memory = int(psutil.virtual_memory().available)
    # Of other machines' memory nothing is known here.
    if not joins(config.cluster) and workers * required.worker > free_memory:
        raise InputError(
            f"not enough memory: {workers} workers need {_gb(required.worker)} each "
            f"(weights {_gb(required.worker_weights)}, Hessians {_gb(required.worker_hessians)}, "
            f"candidates {_gb(required.worker_candidates)}, activations {_gb(required.worker_activations)}, "
            f"process {_gb(required.worker_base)}), {_gb(free_memory)} are free; "
            "lower cluster.workers or calibration.microbatch"
        )
    wanted: dict[int, tuple[Path, int]] = {}
    for path, size in ((config.store.run, required.run_store), (config.store.output, required.repository)):
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        device = existing.stat().st_dev
        wanted[device] = (existing, wanted.get(device, (existing, 0))[1] + size)
    for place, size in wanted.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise InputError(
                f"not enough disk at {place}: run store {_gb(required.run_store)} and repository "
                f"{_gb(required.repository)} are planned, {_gb(free)} are free; choose another store.run or fewer "
                "calibration sequences"
            )


def expected_workers(config: Config) -> int:
    """Workers a run on this machine will have; for planning, before Ray is there."""
    if config.cluster.workers != "auto":
        return config.cluster.workers
    import torch

    return torch.cuda.device_count() or max(1, (os.cpu_count() or 1) // config.cluster.threads)


def fingerprint(config: Config, source: Checkpoint) -> dict[str, Any]:
    """Everything the measurements and candidates depend on, by the name a refusal shows."""
    calibration = config.calibration
    text = calibration.text
    try:
        text_digest = hashlib.sha256(text.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"calibration.text {text}: cannot be read ({error.strerror})") from error
    tokenizer = hashlib.sha256()
    for name in sorted(source.other_files()):
        if name.startswith("tokenizer") or name in ("vocab.json", "merges.txt"):
            tokenizer.update(source.store.get(name))
    return {
        "code": __version__,
        "model": source.fingerprint(),
        "model.dtype": config.model.dtype,
        "calibration.text": text_digest,
        "tokenizer": tokenizer.hexdigest(),
        **{f"calibration.{key}": value for key, value in calibration.model_dump(exclude={"text"}).items()},
        "formats": [str(name) for name in config.formats],
        "rounding": config.rounding.model_dump(mode="json"),
        "cluster.threads": config.cluster.threads,
    }


def open_source(directory: Path) -> Checkpoint:
    """The checkpoint in a local directory."""
    return Checkpoint(Store(directory, create=False))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
