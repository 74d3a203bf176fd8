"""Reading many tensors with few requests: neighbours travel together, and the next batch while one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from prismaquant_ray.checkpoint.header import TensorInfo
from prismaquant_ray.errors import StoreError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Ranged(Protocol):
    """What gives bytes of named things: a store, or something that decodes what one holds."""

    @property
    def uri(self) -> str:
        """Where it is, for errors."""

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]], /) -> list[Buffer]:
        """Bytes [start, stop) of each range."""


#: A tensor and what holds its file.
Piece = tuple[Ranged, TensorInfo]
_BATCH_BYTES = 1 << 26


def read_pieces(pieces: Iterable[Piece], *, batch_bytes: int = _BATCH_BYTES) -> Iterator[tuple[TensorInfo, Buffer]]:
    """Every piece's bytes, in order; at most two batches, or one larger tensor and a batch, are in memory.

    Raises StoreError when a file is shorter than its header says.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read") as thread:
        ahead = None
        for batch in _batches(pieces, batch_bytes):
            following = thread.submit(_read, batch)
            if ahead is not None:
                yield from ahead.result()
            ahead = following
        if ahead is not None:
            yield from ahead.result()


def _batches(pieces: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    filled = 0
    for store, info in pieces:
        if batch and filled + info.nbytes > limit:
            yield batch
            batch, filled = [], 0
        batch.append((store, info))
        filled += info.nbytes
    if batch:
        yield batch


def _read(batch: list[Piece]) -> list[tuple[TensorInfo, Buffer]]:
    """One request a file; the store joins neighbouring ranges."""
    by_file: dict[tuple[int, str], list[int]] = {}
    for index, (store, info) in enumerate(batch):
        by_file.setdefault((id(store), info.file), []).append(index)
    found: dict[int, Buffer] = {}
    for indices in by_file.values():
        store, first = batch[indices[0]]
        spans = [(batch[index][1].start, batch[index][1].stop) for index in indices]
        found |= zip(indices, store.get_ranges(first.file, spans), strict=True)
    for index, (store, info) in enumerate(batch):
        if memoryview(found[index]).nbytes != info.nbytes:
            raise StoreError(f"{store.uri}: {info.file} is shorter than its header says, at {info.name}")
    return [(info, found[index]) for index, (_, info) in enumerate(batch)]
