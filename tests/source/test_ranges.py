"""Pieces arrive whole, in order and from few requests, however they are cut; only what may be cut is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from prismaquant_ray.errors import StoreError
from prismaquant_ray.repository.tensor_checks import _is_finite
from prismaquant_ray.source.header import TensorInfo
from prismaquant_ray.source.protocol import Piece
from prismaquant_ray.source.ranges import BATCH_BYTES, parts, read_pieces
from prismaquant_ray.storage.store import Store


class Counting(Store):
    """A store that knows how many bytes were asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked = 0
        self.lock = threading.Lock()

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Any]:
        with self.lock:
            self.asked += sum(stop - start for start, stop in ranges)
        return [*super().get_ranges(key, ranges)]


def info(name: str, file: str, start: int, stop: int) -> TensorInfo:
    return TensorInfo(name=name, file=file, dtype="U8", shape=(stop - start,), start=start, stop=stop)


@pytest.fixture
def data() -> bytes:
    generator = torch.Generator().manual_seed(0)
    return bytes(torch.randint(0, 256, (100_000,), dtype=torch.uint8, generator=generator).numpy())


@pytest.mark.parametrize("batch", [1, 999, 10_000, 1 << 20])
def test_pieces_arrive_in_the_order_asked_for(batch: int, data: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("a", data)
    store.put("b", data[::-1])
    cuts = [0, 0, 10, 20_000, 20_001, 70_000, 100_000]
    spans = list(pairwise(cuts))
    wanted = [info(f"{file}{start}", file, start, stop) for start, stop in reversed(spans) for file in "ab"]
    found = [
        (each, bytes(memoryview(read))) for each, read in read_pieces(((store, w) for w in wanted), batch_bytes=batch)
    ]
    assert [each for each, _ in found] == wanted
    for each, read in found:
        assert read == (data if each.file == "a" else data[::-1])[each.start : each.stop]


@pytest.mark.parametrize("size", [1000, 10_000])
def test_only_some_batches_are_read_ahead(size: int, data: bytes, tmp_path: Path) -> None:
    store = Counting(tmp_path)
    store.put("a", data)
    pieces: list[Piece] = [(store, info(str(at), "a", at, at + size)) for at in range(0, len(data), size)]
    used = 0
    for each, _ in read_pieces(pieces, batch_bytes=1000):
        used += each.nbytes
        # Five batches, or two tensors that are larger than one, with the one in use.
        assert store.asked - used <= max(4 * 1000, size)
    assert used == store.asked == len(data)


def test_a_file_that_is_shorter_than_it_says_is_an_error(data: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("a", data)
    with pytest.raises(StoreError):
        list(read_pieces([(store, info("x", "a", len(data) - 5, len(data) + 5))]))


def test_large_tensors_of_a_store_are_cut_and_decoded_ones_are_not(tmp_path: Path) -> None:
    class Decoder:
        uri = "decoder"
        divisible = False

        def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]], /) -> list[Any]:
            raise AssertionError

    whole = info("x", "a", 8, 8 + 2 * BATCH_BYTES + 1)
    cut = list(parts((Store(tmp_path), whole)))
    assert [(each.start, each.stop) for _, each in cut] == [
        (8, 8 + BATCH_BYTES), (8 + BATCH_BYTES, 8 + 2 * BATCH_BYTES), (8 + 2 * BATCH_BYTES, whole.stop),
    ]  # fmt: skip
    assert {each.name for _, each in cut} == {"x"}
    assert list(parts((Store(tmp_path), info("x", "a", 8, 8)))) == []
    piece: Piece = (Decoder(), whole)
    assert list(parts(piece)) == [piece]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for length in (1, 7, 16, 33, 130):
        values = torch.linspace(-1, 1, length).to(dtype)
        values[0], values[-1] = -largest, largest
        assert _is_finite(values)
        for position in range(length):
            for bad in (float("nan"), float("inf"), -float("inf")):
                changed = values.clone()
                changed[position] = bad
                assert not _is_finite(changed)
