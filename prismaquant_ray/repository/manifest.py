"""The files that make a directory or prefix a repository of ours, and the checks that nothing else is replaced."""

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
#: `kind` in the manifest of decoded weights, which must not be taken for a quantized repository; that has no `kind`.
DEQUANTIZED = "dequantized"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def claim(output: Prefix, body: Mapping[str, Any]) -> list[str]:
    """Mark a prefix as ours and as incomplete, by a manifest with `body`; what a former repository may leave behind.

    InputError when something else is there, or a dequantized repository where `body` is of a quantized one.
    """
    keys = output.list()
    check_ours(output.uri, keys)
    manifest = output.get(MANIFEST) if MANIFEST in keys else b"{}"
    if is_dequantized(manifest) and body.get("kind") != DEQUANTIZED:
        raise InputError(f"{output.uri} holds a dequantized repository; choose another output")
    listed = _listed(manifest)
    stale = [key for key in keys if key in listed or _SHARD.fullmatch(key)]
    output.delete([CONFIG, INDEX])
    # The old names are kept until the new files are there: the next attempt must know them, too.
    output.put(MANIFEST, as_json({**body, "complete": False, "files": dict.fromkeys(stale, 0)}))
    return stale


def check_ours(uri: str, keys: Sequence[str]) -> None:
    """InputError unless these keys are those of a repository of ours, or none."""
    if keys and MANIFEST not in keys:
        raise InputError(f"{uri} holds something else ({keys[0]}); choose another output or empty it")


def is_dequantized(manifest: bytes) -> bool:
    """Whether a manifest is that of a dequantized repository; one that cannot be read is not."""
    try:
        body = json.loads(manifest)
    except ValueError:
        return False
    return isinstance(body, dict) and body.get("kind") == DEQUANTIZED


def _listed(manifest: bytes) -> set[str]:
    """The files that a manifest names; none when it cannot be read, a stopped write may have cut it."""
    try:
        files = json.loads(manifest)["files"]
    except (ValueError, KeyError, TypeError):
        return set()
    return set(files) if isinstance(files, dict) else set()


def as_json(body: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file for people to read."""
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
