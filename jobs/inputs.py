"""Finding and checking everything a run starts from, before anything expensive."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from actors.connect import joins
from actors.memory import free_memory
from actors.memory_plan import MemoryPlan, ShardSize, shard_size
from prismaquant_ray import __version__
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.files import loading
from prismaquant_ray.calibration.text import load_sequences
from prismaquant_ray.config import Config, ModelConfig
from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.formatting import gigabytes
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.runner import check_finite
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.source.resolve import local_files, resolve
from prismaquant_ray.storage.connection import absolute
from prismaquant_ray.storage.store import Store, check_directory

# Files that decide what text and images become: of the tokenizer, and of the processor.
_PREPARING = ("tokenizer", "processor", "preprocessor", "chat_template")


def open_source(model: ModelConfig, *, weights: bool = True) -> TensorSource:
    """The checkpoint: as given, from the hub's cache, or written from the package that embeds it.

    Where `weights` are not needed, a directory with nothing but a configuration will do.
    """
    if model.embedded is not None:
        from benchmarks.bundled_model import materialise

        return Checkpoint(Store(materialise(model.embedded, Path(model.source)), create=False))
    store = resolve(model.source, model.revision)
    if store.path is None:
        store.check_readable()
    if not weights:
        from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint

        if ConfigOnlyCheckpoint.fits(store):
            return ConfigOnlyCheckpoint(store)
    return Checkpoint(store)


def absolute_source(model: ModelConfig) -> str:
    """`model.source` as a worker in another directory understands it; a hub id stays one, for each node's own cache."""
    return absolute(model.source) if "://" in model.source or Path(model.source).is_dir() else model.source


def load_tokenizer(source: TensorSource, directory: str | Path) -> Any:
    """The model's tokenizer, from a directory that has its files; InputError when there is none."""
    from transformers import AutoTokenizer

    uri = source.store.uri
    with loading(lambda error: f"{uri}: no tokenizer can be loaded ({' '.join(str(error).split())[:200]})"):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def load_tokens(
    source: TensorSource,
    layout: Layout,
    text: Path,
    images: Path | None,
    *,
    sequences: int,
    length: int,
    seed: int,
    holdout: float,
) -> CalibrationSet:
    """Texts and images, as the model's own tokenizer and processor make them; InputError when the text is too short."""
    with local_files(source) as directory:
        tokenizer = load_tokenizer(source, directory)
        texts = load_sequences(text, tokenizer, sequences=sequences, length=length, seed=seed, holdout=holdout)
        if images is None:
            return texts
        from prismaquant_ray.calibration.images import load_images

        assert layout.image_token is not None
        found = load_images(images, directory, image_token=layout.image_token)
        return texts.with_images((image.inputs for image in found), holdout)


def exists(location: Path | str, key: str) -> bool:
    """Whether a run store or repository has an object; looking does not create the place."""
    if isinstance(location, Path):
        return (location / key).is_file()
    store = Store(location)
    store.check_readable()
    return store.size(key) is not None


def empty(store: Store, *, keep: str) -> None:
    """Delete everything but what is below `keep`."""
    store.delete(key for key in store.list() if not key.startswith(keep))


def check_stores(config: Config) -> None:
    """InputError or StoreError unless the run store and the output can be written."""
    for location in (config.store.run, config.store.output):
        Store(location, create=False).check_writable() if isinstance(location, str) else check_directory(location)


def check_weights(source: TensorSource, layout: Layout) -> None:
    """InputError naming the first tensor with a NaN or an infinity; one block in memory at a time."""
    for names in (layout.embedding, layout.head, *(block.tensors for block in layout.blocks)):
        for name in names:
            check_finite(source.read([name]), source.store.uri)


def check_room(config: Config, required: MemoryPlan) -> ShardSize:
    """Blocks a worker of this machine will load at a time.

    InputError with the plan's figures when memory or disk cannot hold the run. Of other machines' memory nothing is
    known here; their workers say what they have when they are there.
    """
    workers = expected_workers(config)
    size = shard_size(required, config, workers=workers, free=free_device_memory(config) // workers)
    if required.worker(1) > size.free and (not joins(config.cluster) or config.cluster.memory != "auto"):
        raise InputError(
            f"not enough memory: {workers} workers need {gigabytes(required.worker(1))} each (weights "
            f"{gigabytes(required.block_weights)}, Hessians {gigabytes(required.block_hessians)}, candidates "
            f"{gigabytes(required.block_candidates)}, activations {gigabytes(required.block_activations)}, head "
            f"{gigabytes(required.exit)}, working {gigabytes(required.working)}, process "
            f"{gigabytes(required.base)}), {gigabytes(size.free)} "
            "are there for each; lower cluster.workers or calibration.microbatch"
        )
    sizes = {config.store.run: required.run_store(size.blocks), config.store.output: required.repository}
    wanted: dict[int, tuple[Path, int]] = {}
    for path, bytes_ in sizes.items():
        if isinstance(path, str):
            continue  # object stores have no end
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        device = existing.stat().st_dev
        wanted[device] = (existing, wanted.get(device, (existing, 0))[1] + bytes_)
    for place, bytes_ in wanted.values():
        free = shutil.disk_usage(place).free
        if bytes_ > free:
            raise InputError(
                f"not enough disk at {place}: run store {gigabytes(required.run_store(size.blocks))} and repository "
                f"{gigabytes(required.repository)} are planned, {gigabytes(free)} are free; choose another store.run "
                "or fewer calibration sequences"
            )
    return size


def expected_workers(config: Config) -> int:
    """Workers a run on this machine will have; for planning, before Ray is there."""
    if config.cluster.workers != "auto":
        return config.cluster.workers
    import torch

    gpus = torch.cuda.device_count() if config.cluster.device != "cpu" else 0
    return gpus or max(1, (os.cpu_count() or 1) // config.cluster.threads)


def free_device_memory(config: Config) -> int:
    """Bytes free where workers of this machine would compute, of all of them together."""
    import torch

    if config.cluster.device != "cpu" and torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    return free_memory()


def fingerprint(config: Config, source: TensorSource) -> dict[str, Any]:
    """Everything the measurements and candidates depend on, by the name a refusal shows."""
    calibration = config.calibration
    text = calibration.text
    try:
        text_digest = hashlib.sha256(text.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"calibration.text {text}: cannot be read ({error.strerror})") from error
    tokenizer = hashlib.sha256()
    for name in sorted(source.other_files()):
        if name.startswith(_PREPARING) or name in ("vocab.json", "merges.txt"):
            tokenizer.update(source.store.get(name))
    images = None
    if calibration.images is not None:
        from prismaquant_ray.calibration.images import files_digest

        images = files_digest(calibration.images)
    return {
        "code": __version__,
        "model": source.fingerprint(),
        "model.dtype": config.model.dtype,
        "model.quantize_lm_head": config.model.quantize_lm_head,
        "calibration.text": text_digest,
        "calibration.images": images,
        "tokenizer": tokenizer.hexdigest(),
        **{f"calibration.{key}": value for key, value in calibration.model_dump(exclude={"text", "images"}).items()},
        "formats": [str(name) for name in config.formats],
        "rounding": config.rounding.model_dump(mode="json"),
        "cluster.threads": config.cluster.threads,
    }


def refuse_mismatch(store: Store, fingerprint: dict[str, Any]) -> None:
    """InputError naming the first thing in which the run in the store is another one."""
    try:
        stored = json.loads(store.get("run.json"))["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{store.uri}: run.json cannot be read; choose another store.run") from error
    for key, value in fingerprint.items():
        if stored.get(key) != value:
            shown = f"{stored.get(key)!r}, now {value!r}" if len(repr(value)) < 60 else "something else"
            raise InputError(
                f"{store.uri} holds a run with another {key} ({shown}); choose another store.run, or start this one "
                "over with --fresh"
            )
