"""The files that mark a directory or prefix as our repository, and checks against overwriting anything else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prismaquant_ray.errors import InputError
from prismaquant_ray.parsing import MalformedError
from prismaquant_ray.serialization import from_bytes
from prismaquant_ray.source.files import CONFIG, INDEX
from prismaquant_ray.storage.prefix import Prefix

if TYPE_CHECKING:
    from prismaquant_ray.repository.shards import Shards

README = "README.md"
MANIFEST = "prismaquant.json"
MANIFEST_SCHEMA = 1
#: `kind` in the manifest of a dequantized repository; a quantized one has no `kind`.
DEQUANTIZED = "dequantized"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """`prismaquant.json` as programs read it: what it does not say is None or empty.

    `files` are all files with their bytes, `sha256` their digests, `choice` is the format of every group. `kv_cache` is
    set where the KV cache is in FP8.
    """

    schema: int | None = None
    kind: str | None = None
    complete: bool = False
    choice: dict[str, str] | None = None
    kv_cache: Literal["fp8"] | None = None
    files: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def dequantized(self) -> bool:
        """Whether it describes a dequantized repository."""
        return self.kind == DEQUANTIZED


def is_shard(name: str) -> bool:
    """Whether a file of a repository is one of its shards."""
    return _SHARD.fullmatch(name) is not None


def read_manifest(data: bytes) -> Manifest:
    """What a manifest says; MalformedError when it cannot be read."""
    try:
        return from_bytes(Manifest, data)
    except MalformedError:
        raise
    except ValueError as error:
        raise MalformedError(f"is not as it was written ({error})") from error


def claim(output: Prefix, body: Mapping[str, Any]) -> list[str]:
    """Mark a prefix as ours and incomplete, by a manifest with `body`; returns the files of an earlier repository.

    Raises:
        InputError: something else is there, or a dequantized repository where `body` describes a quantized one.
    """
    keys = output.list()
    check_ours(output.uri, keys)
    manifest = output.get(MANIFEST) if MANIFEST in keys else b"{}"
    earlier = readable_manifest(manifest)
    if earlier.dequantized and body.get("kind") != DEQUANTIZED:
        raise InputError(f"{output.uri} holds a dequantized repository; choose another output")
    stale = [key for key in keys if key in earlier.files or is_shard(key)]
    output.delete([CONFIG, INDEX])
    # The manifest lists the old files until the new ones are there, so that another attempt finds them too.
    output.put(MANIFEST, as_json({**body, "complete": False, "files": dict.fromkeys(stale, 0)}))
    return stale


def check_ours(uri: str, keys: Sequence[str]) -> None:
    """Raise InputError unless the keys are empty or those of our repository."""
    if keys and MANIFEST not in keys:
        raise InputError(f"{uri} holds something else ({keys[0]}); choose another output or empty it")


def readable_manifest(data: bytes) -> Manifest:
    """What a manifest says, or nothing, where it cannot be read: it may be cut, and is written again."""
    try:
        return read_manifest(data)
    except MalformedError:
        return Manifest()


def sizes_and_digests(shards: Shards, small: Mapping[str, bytes]) -> tuple[dict[str, int], dict[str, str]]:
    """`files` and `sha256` of a manifest: of shards that are written, and of the other files."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    return shards.files | {name: len(data) for name, data in small.items()}, shards.sha256 | digests


def as_json(body: Mapping[str, Any]) -> bytes:
    """Indented JSON as bytes."""
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
