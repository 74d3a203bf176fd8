"""The BF16 weights of a compressed-tensors repository, as a repository."""

from __future__ import annotations

import shutil
from dataclasses import replace

from prismaquant_ray.compressed.dequantize import DequantizedRepository, QuantizedRepository, check_place
from prismaquant_ray.errors import InputError
from prismaquant_ray.repository.staging import staged_output
from prismaquant_ray.storage.connection import local_path
from prismaquant_ray.storage.store import Store, check_directory, existing


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
    return replace(written, source=repository, repository=output)


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
