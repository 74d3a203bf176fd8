"""`dequantize REPO OUT`: the BF16 weights of a compressed-tensors repository, as a repository; needs nothing else."""

from __future__ import annotations

import shutil
from typing import Any

from rich.console import Console

from prismaquant_ray.compressed.dequantize import QuantizedRepository, check_place
from prismaquant_ray.errors import InputError
from prismaquant_ray.repository.staging import staged_output
from prismaquant_ray.storage.connection import local_path
from prismaquant_ray.storage.store import Store, check_directory, existing


def run(repository: str, output: str) -> dict[str, Any]:
    """Decode every quantized weight. Nothing appears at `output` unless it is complete."""
    quantized = QuantizedRepository(existing(repository))
    check_place(repository, output)
    _check_room(output, quantized.bytes_after)
    with staged_output(output) as staging:
        written = quantized.write(staging)
    return {
        "source": repository,
        "repository": output,
        "modules": {str(name): count for name, count in quantized.formats.items()},
        "tensors": len(quantized.outputs),
        "bytes_before": quantized.bytes_before,
        "bytes_after": quantized.bytes_after,
        "files": written.files,
        "sha256": written.sha256,
        "notes": list(written.caveats),
    }


def _check_room(output: str, size: int) -> None:
    """InputError or StoreError unless so many bytes can be written there, as far as that can be known."""
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


def render(result: dict[str, Any], console: Console) -> None:
    """What was written, for people."""
    modules = ", ".join(f"{count} {name}" for name, count in result["modules"].items())
    console.print(
        f"{result['repository']}: {modules or 'no'} modules as BF16, {result['bytes_before'] / 1e6:,.1f} MB of weights "
        f"→ {result['bytes_after'] / 1e6:,.1f} MB",
        soft_wrap=True,
    )
    for note in result["notes"]:
        console.print(f"  {note}", soft_wrap=True)
