"""Writing tensors as the shards of a repository, and marking a prefix as ours before anything is written there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from prismaquant_ray.errors import InputError
from prismaquant_ray.source.checkpoint import INDEX
from prismaquant_ray.source.header import build_header
from prismaquant_ray.source.protocol import Piece
from prismaquant_ray.source.ranges import parts, read_pieces
from prismaquant_ray.storage.prefix import ByteWriter, Prefix

CONFIG = "config.json"
MANIFEST = "prismaquant.json"
MANIFEST_SCHEMA = 1
#: `kind` in the manifest of decoded weights, which must not be taken for a quantized repository; that has no `kind`.
DEQUANTIZED = "dequantized"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write: its bytes are those of its pieces, one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def copy(cls, piece: Piece) -> Output:
        """A tensor as it is elsewhere."""
        _, info = piece
        return cls(info.name, info.dtype, info.shape, (piece,))

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return sum(info.nbytes for _, info in self.pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """Shards that were written: bytes and digest by file, and the file of every tensor."""

    files: dict[str, int]
    sha256: dict[str, str]
    weight_map: dict[str, str]


# Shards -------------------------------------------------------------------------------------------------------------


def cut(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    """Consecutive runs of at most `limit` bytes; a larger tensor is alone."""
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.nbytes
    return shards


def write_shards(store: Prefix, outputs: Sequence[Output], *, limit: int) -> Shards:
    """Stream tensors, in this order, into shards of at most `limit` bytes of data."""
    shards = cut(outputs, limit)
    written = Shards(files={}, sha256={}, weight_map={})
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written.files[file], written.sha256[file] = _write_shard(store, file, shard)
        written.weight_map.update((output.name, file) for output in shard)
    return written


def _write_shard(store: Prefix, file: str, shard: Sequence[Output]) -> tuple[int, str]:
    """Bytes and digest of the shard."""
    header = build_header({output.name: (output.dtype, output.shape, output.nbytes) for output in shard})

    def write(writer: ByteWriter) -> str:
        digest = hashlib.sha256(header)
        writer.write(header)
        pieces = (part for output in shard for piece in output.pieces for part in parts(piece))
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
            for _, data in read_pieces(pieces):
                hashed = pool.submit(digest.update, data)
                writer.write(data)
                hashed.result()
        return digest.hexdigest()

    return len(header) + sum(output.nbytes for output in shard), store.upload(file, write)


# The prefix ---------------------------------------------------------------------------------------------------------


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
