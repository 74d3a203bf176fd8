"""The BF16 weights of a compressed-tensors repository, as a repository."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from prismaquant_ray.compressed.dequantize import QuantizedRepository, check_place
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.repository.staging import staged_output
from prismaquant_ray.storage.connection import local_path
from prismaquant_ray.storage.store import Store, check_directory, existing


@dataclass(frozen=True, kw_only=True, slots=True)
class DequantizedRepository:
    """A repository in BF16: modules by original format, bytes of weights before and after, SHA-256 of shards."""

    source: str
    repository: str
    modules: dict[FormatName, int]
    tensors: int
    bytes_before: int
    bytes_after: int
    files: dict[str, int]
    sha256: dict[str, str]
    notes: list[str]


def dequantize(repository: str, output: str) -> DequantizedRepository:
    """Decode every quantized weight as vLLM does. The result appears at `output` only when it is complete.

    Raises:
        InputError: `repository` cannot be decoded, or `output` cannot hold the result.
    """
    quantized = QuantizedRepository(existing(repository))
    check_place(repository, output)
    _check_room(output, quantized.bytes_after)
    with staged_output(output) as staging:
        written = quantized.write(staging)
    return DequantizedRepository(
        source=repository,
        repository=output,
        modules=dict(quantized.formats),
        tensors=len(quantized.outputs),
        bytes_before=quantized.bytes_before,
        bytes_after=quantized.bytes_after,
        files=written.files,
        sha256=written.sha256,
        notes=list(written.caveats),
    )


def _check_room(output: str, size: int) -> None:
    """Raise InputError or StoreError unless `size` bytes can be written; an object store's free space is unknown."""
    path = local_path(output)
    if path is None:
        Store(output, create=False).check_writable()
        return
    check_directory(path)
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise InputError(
            f"not enough disk at {place}: {size / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free; choose "
            "another output"
        )
