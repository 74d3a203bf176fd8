"""The files that mark a directory or prefix as our repository, and checks against overwriting anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prismaquant_ray.errors import InputError
from prismaquant_ray.source.files import CONFIG, INDEX
from prismaquant_ray.storage.prefix import Prefix

README = "README.md"
MANIFEST = "prismaquant.json"
MANIFEST_SCHEMA = 1
#: `kind` in the manifest of a dequantized repository; a quantized one has no `kind`.
DEQUANTIZED = "dequantized"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def claim(output: Prefix, body: Mapping[str, Any]) -> list[str]:
    """Mark a prefix as ours and incomplete, by a manifest with `body`; returns the files of an earlier repository.

    Raises:
        InputError: something else is there, or a dequantized repository where `body` describes a quantized one.
    """
    keys = output.list()
    check_ours(output.uri, keys)
    manifest = output.get(MANIFEST) if MANIFEST in keys else b"{}"
    if is_dequantized(manifest) and body.get("kind") != DEQUANTIZED:
        raise InputError(f"{output.uri} holds a dequantized repository; choose another output")
    listed = _listed(manifest)
    stale = [key for key in keys if key in listed or _SHARD.fullmatch(key)]
    output.delete([CONFIG, INDEX])
    # The manifest lists the old files until the new ones are there, so that another attempt finds them too.
    output.put(MANIFEST, as_json({**body, "complete": False, "files": dict.fromkeys(stale, 0)}))
    return stale


def check_ours(uri: str, keys: Sequence[str]) -> None:
    """Raise InputError unless the keys are empty or those of our repository."""
    if keys and MANIFEST not in keys:
        raise InputError(f"{uri} holds something else ({keys[0]}); choose another output or empty it")


def is_dequantized(manifest: bytes) -> bool:
    """Whether a manifest describes a dequantized repository; False if it is unreadable."""
    try:
        body = json.loads(manifest)
    except ValueError:
        return False
    return isinstance(body, dict) and body.get("kind") == DEQUANTIZED


def _listed(manifest: bytes) -> set[str]:
    """The files that a manifest lists; empty if it is unreadable, for example truncated."""
    try:
        files = json.loads(manifest)["files"]
    except (ValueError, KeyError, TypeError):
        return set()
    return set(files) if isinstance(files, dict) else set()


def as_json(body: Mapping[str, Any]) -> bytes:
    """Indented JSON as bytes."""
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
