"""Checks before anything expensive: stores, weights, memory, disk, and the fingerprint of the run."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from actors.connect import OBJECT_STORE_BYTES, joins
from actors.memory import free_memory, planned_of
from actors.memory_plan import ADVICE, Free, MemoryPlan, ShardSize, shard_size
from jobs.pipeline.sources import text_digest
from prismaquant_ray import __version__, records
from prismaquant_ray.calibration.reading import TextReader
from prismaquant_ray.config import Config
from prismaquant_ray.copies import has_own_memory
from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.formatting import gigabytes
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.runner import check_finite
from prismaquant_ray.parsing import MAX_BYTES
from prismaquant_ray.records import RunRecord, Settings
from prismaquant_ray.repository.manifest import as_json
from prismaquant_ray.repository.routing import unroutable_because
from prismaquant_ray.serialization import from_bytes
from prismaquant_ray.settings.data import EvaluationConfig
from prismaquant_ray.settings.texts import PYTHON, TextSource
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.source.resolve import small_file
from prismaquant_ray.storage.store import Store, check_directory

# Prefixes of the files of tokenizer and processor, which determine the tokens.
_PREPARING = ("tokenizer", "processor", "preprocessor", "chat_template")


def exists(location: Path | str, key: str) -> bool:
    """Whether a run store or repository has an object; does not create the place."""
    if isinstance(location, Path):
        return (location / key).is_file()
    store = Store(location)
    store.check_readable()
    return store.size(key) is not None


def empty(store: Store, *, keep: str) -> None:
    """Delete all objects except those under the prefix `keep`."""
    store.delete(key for key in store.list() if not key.startswith(keep))


def check_stores(config: Config) -> None:
    """Raise InputError or StoreError unless the run store and the output are writable."""
    for location in (config.store.run, config.store.output):
        Store(location, create=False).check_writable() if isinstance(location, str) else check_directory(location)


def check_weights(source: TensorSource, layout: Layout) -> None:
    """Raise InputError for the first tensor with NaN or infinity; holds one tensor in memory at a time."""
    for names in (layout.embedding, layout.head, *(block.tensors for block in layout.blocks)):
        for name in names:
            check_finite(source.read([name]), source.store.uri)


def check_tied(source: TensorSource, layout: Layout) -> None:
    """Raise InputError where config.json ties embedding and output head, and the checkpoint has two that differ.

    transformers would use both, a server that follows config.json the embedding.
    """
    if layout.tied is None:
        return
    import torch

    read = source.read(layout.tied)
    if not torch.equal(*(read[name] for name in layout.tied)):
        embedding, head = layout.tied
        raise InputError(
            f"{source.store.uri}: config.json says tie_word_embeddings, but {head} is not {embedding}; set "
            f"tie_word_embeddings to false if the model has an output head of its own, or remove {head}"
        )


def check_output_config(source: TensorSource, layout: Layout, formats: Sequence[FormatName]) -> None:
    """Raise InputError where no server would find every Linear by its name, or config.json could not be written."""
    try:
        as_json(source.config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source.store.uri}: config.json could not be written again: {error}; correct it") from error
    problem = unroutable_because(layout, formats)
    if problem is not None:
        raise InputError(
            f"{source.store.uri}: {problem}; {layout.architecture} needs a family that says how its modules are named "
            "(docs/adding-a-model.md)"
        )


def check_room(config: Config, plan: MemoryPlan) -> ShardSize:
    """Blocks that a worker of this machine will load at a time. Workers of other machines report their own memory.

    Raises:
        InputError: memory or disk cannot hold the run; the message has the plan's figures.
    """
    workers = expected_workers(config)
    size = shard_size(plan, config, workers=workers, free=free_here(config, workers))
    lacking = plan.lacking(size.free)
    if lacking is not None and (not joins(config.cluster) or config.cluster.memory != "auto"):
        raise InputError(
            f"not enough memory: each of {workers} workers needs {lacking} for each (weights "
            f"{gigabytes(plan.block_weights)}, Hessians {gigabytes(plan.block_hessians)}, candidates "
            f"{gigabytes(plan.block_candidates)}, activations {gigabytes(plan.block_activations)}, head "
            f"{gigabytes(plan.exit)}, working {gigabytes(plan.working)}, process {gigabytes(plan.base)}); {ADVICE}"
        )
    _check_disk(config, plan, size.blocks)
    return size


def _check_disk(config: Config, plan: MemoryPlan, blocks: int) -> None:
    """Raise InputError unless run store and repository fit on their local disks."""
    sizes = {config.store.run: plan.run_store(blocks), config.store.output: plan.repository}
    wanted: dict[int, tuple[Path, int]] = {}
    for path, bytes_ in sizes.items():
        if isinstance(path, str):
            continue
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        device = existing.stat().st_dev
        wanted[device] = (existing, wanted.get(device, (existing, 0))[1] + bytes_)
    for place, bytes_ in wanted.values():
        free = shutil.disk_usage(place).free
        if bytes_ > free:
            raise InputError(
                f"not enough disk at {place}: run store {gigabytes(plan.run_store(blocks))} and repository "
                f"{gigabytes(plan.repository)} are planned, {gigabytes(free)} are free; choose another store.run or "
                "fewer calibration sequences"
            )


def with_dtype(config: Config, *, gpu: bool | None = None) -> Config:
    """The configuration with `model.dtype` decided, for GPUs or not: a run has one for good."""
    if config.model.dtype != "auto":
        return config
    if gpu is None:
        gpu = config.cluster.device == "gpu"
        if config.cluster.device == "auto":
            import torch

            gpu = torch.cuda.is_available()
    decided = config.model.model_copy(update={"dtype": "bfloat16" if gpu else "float32"})
    return config.model_copy(update={"model": decided})


def with_rows(config: Config, text: object, evaluation_text: object) -> Config:
    """The configuration with the rows of a program, where there are any, as its sources of text."""
    rows = (TextSource(path=PYTHON),)
    if text is not None:
        config = config.model_copy(update={"calibration": config.calibration.model_copy(update={"text": rows})})
    if evaluation_text is not None:
        evaluation = config.evaluation or EvaluationConfig()
        config = config.model_copy(update={"evaluation": evaluation.model_copy(update={"text": rows})})
    return config


def with_formats(config: Config, stored: Settings | None) -> tuple[Config, str | None]:
    """The configuration with the formats that limits on time add, and a word where the stored run lacks them.

    `stored` is the fingerprint of the run in the store, None where there is none: what it was measured without cannot
    be chosen.
    """
    named = [str(name) for name in config.formats]
    added = ", ".join(name for name in config.paired_formats if name not in named)
    if not added or not config.allocation.limits.given:
        return config, None
    if stored is not None and stored.get("formats") == named:
        return config, f"the run was measured without {added}: limits are kept by its formats alone; --fresh adds it"
    return config.model_copy(update={"formats": config.paired_formats}), None


def expected_workers(config: Config) -> int:
    """Number of workers of a run on this machine, for planning before Ray has started."""
    if config.cluster.workers != "auto":
        return config.cluster.workers
    import torch

    gpus = torch.cuda.device_count() if config.cluster.device != "cpu" else 0
    return gpus or max(1, (os.cpu_count() or 1) // config.cluster.threads)


def free_here(config: Config, workers: int) -> Free:
    """What each of `workers` workers may take on this machine, beside the object store of a Ray started here."""
    import torch

    host = max(0, free_memory() - (0 if joins(config.cluster) else OBJECT_STORE_BYTES)) // workers
    if config.cluster.device == "cpu" or not torch.cuda.is_available():
        return Free(memory=host)
    devices = range(torch.cuda.device_count())
    least = min(planned_of(torch.cuda.mem_get_info(device)[0]) for device in devices)
    if all(has_own_memory(torch.device("cuda", device)) for device in devices):
        return Free(memory=least, host=host, gpu=True)
    return Free(memory=min(least, host), gpu=True)


def fingerprint(config: Config, source: TensorSource, reader: TextReader) -> Settings:
    """Everything that measurements and candidates depend on, by the name shown on a mismatch."""
    calibration = config.calibration
    tokenizer = hashlib.sha256()
    for name in sorted(source.other_files()):
        if name.startswith(_PREPARING) or name in ("vocab.json", "merges.txt"):
            tokenizer.update(small_file(source.store, name))
    images = None
    if calibration.images is not None:
        from prismaquant_ray.calibration.images import files_digest

        images = files_digest(calibration.images)
    return {
        "code": __version__,
        "model": source.fingerprint(),
        "model.dtype": config.model.dtype,
        "model.quantize_lm_head": config.model.quantize_lm_head,
        "calibration.text": text_digest(calibration, reader),
        "calibration.images": images,
        "tokenizer": tokenizer.hexdigest(),
        **{f"calibration.{key}": value for key, value in calibration.model_dump(exclude={"text", "images"}).items()},
        "formats": [str(name) for name in config.formats],
        "rounding": config.rounding.model_dump(mode="json"),
        "cluster.threads": config.cluster.threads,
    }


def stored_fingerprint(store: Store) -> Settings:
    """The fingerprint of the run in a store; StoreError where it cannot be read."""
    try:
        return from_bytes(RunRecord, store.get(records.RUN, MAX_BYTES)).fingerprint
    except (ValueError, KeyError) as error:
        raise StoreError(f"{store.uri}: {records.RUN} cannot be read ({error}); choose another store.run") from error


def refuse_mismatch(store: Store, fingerprint: Settings, paired: Sequence[FormatName]) -> None:
    """Raise InputError naming the first difference between `fingerprint` and that of the stored run.

    A finished run may have what limits added to its formats, `paired`, also where there are none any more.
    """
    stored = stored_fingerprint(store)
    for key, value in fingerprint.items():
        added = key == "formats" and stored.get(key) == [str(name) for name in paired]
        if added and store.size(records.MEASURED) is not None:
            continue
        if stored.get(key) != value:
            shown = f"{stored.get(key)!r}, now {value!r}" if len(repr(value)) < 60 else "something else"
            raise InputError(
                f"{store.uri} holds a run with another {key} ({shown}); choose another store.run, or start this one "
                "over with --fresh"
            )
