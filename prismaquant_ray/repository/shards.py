"""Writing tensors as the shards of a repository."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prismaquant_ray.source.header import build_header
from prismaquant_ray.source.protocol import Piece
from prismaquant_ray.source.ranges import parts, read_pieces
from prismaquant_ray.storage.prefix import ByteWriter, Prefix


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write; its data is the concatenation of its pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def copy(cls, piece: Piece) -> Output:
        """An unchanged copy of a tensor."""
        _, info = piece
        return cls(info.name, info.dtype, info.shape, (piece,))

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return sum(info.nbytes for _, info in self.pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """Written shards: bytes and SHA-256 by file, and the file of every tensor."""

    files: dict[str, int]
    sha256: dict[str, str]
    weight_map: dict[str, str]


def cut(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    """Split into consecutive shards of at most `limit` bytes; a larger tensor gets its own shard."""
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
    """Write one shard; returns its bytes and SHA-256."""
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
