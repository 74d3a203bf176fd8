"""Reading many tensors with few requests: neighbours are batched, and batches are read ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from prismaquant_ray.errors import StoreError
from prismaquant_ray.source.header import TensorInfo
from prismaquant_ray.source.protocol import Piece

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Bytes read at once: allocators reuse buffers of this size, and fault in larger ones page by page.
BATCH_BYTES = 1 << 24
# Batches in memory, including the one in use.
_BATCHES = 4


def threads() -> int:
    """Threads for hashing, decoding and comparing."""
    return min(8, os.cpu_count() or 1)


def read_pieces(pieces: Iterable[Piece], *, batch_bytes: int = BATCH_BYTES) -> Iterator[tuple[TensorInfo, Buffer]]:
    """Every piece's bytes, in order; at most five batches, or two larger tensors, are in memory.

    Raises:
        StoreError: a file is shorter than its header says.
    """
    with ThreadPoolExecutor(_BATCHES - 1, thread_name_prefix="read") as pool:
        waiting: deque[tuple[int, Future[list[tuple[TensorInfo, Buffer]]]]] = deque()
        for batch in _batches(pieces, batch_bytes):
            waiting.append((sum(info.nbytes for _, info in batch), pool.submit(_read, batch)))
            while len(waiting) > 1 and sum(size for size, _ in waiting) > (_BATCHES - 1) * batch_bytes:
                yield from waiting.popleft()[1].result()
        while waiting:
            yield from waiting.popleft()[1].result()


def parts(piece: Piece) -> Iterator[Piece]:
    """Split a piece into pieces of at most `BATCH_BYTES`; decoded tensors are not split."""
    holder, info = piece
    if not holder.divisible:
        yield piece
        return
    for start, stop in pairwise([*range(info.start, info.stop, BATCH_BYTES), info.stop]):
        yield holder, replace(info, start=start, stop=stop)


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
    """One request per file; the store merges neighbouring ranges."""
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
