"""Matrices stored in 32 bits, read as BF16: what a plan calls BF16 has 16 bits on disk, whatever the source had.

Norms, biases and routers stay as they are: their bytes are few, and some models ask for them in 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prismaquant_ray.source.header import TensorInfo
from prismaquant_ray.storage.prefix import Files

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WIDE = "F32"
_ROUTERS = frozenset({"gate", "router", "wg", "shared_expert_gate"})
_TYPES = ("dtype", "torch_dtype")


def wide_matrices(infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Those that are read as BF16, by name, as they are stored."""
    return {
        info.name: info
        for info in infos
        if info.dtype == _WIDE
        and (len(info.shape) == 3 or (len(info.shape) == 2 and info.name.endswith(".weight")))
        and _ROUTERS.isdisjoint(info.name.split("."))
        # Of some models norms have a row for each head.
        and "norm" not in info.name.rpartition(".")[0].rpartition(".")[2]
    }


def as_bf16(info: TensorInfo) -> TensorInfo:
    """A tensor as it is read; its `file` is its name."""
    return replace(info, file=info.name, dtype="BF16", start=0, stop=info.nbytes // 2)


def with_bf16(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose matrices are BF16."""
    found = {key: "bfloat16" if key in _TYPES and value == "float32" else value for key, value in config.items()}
    return {key: with_bf16(value) if isinstance(value, dict) else value for key, value in found.items()}


def narrowed(buffer: Buffer) -> Tensor:
    """The numbers of a buffer of float32, in BF16."""
    # bytearray: torch warns about read-only buffers.
    return torch.frombuffer(bytearray(memoryview(buffer)), dtype=torch.float32).bfloat16()


class Bf16Decoder:
    """The bytes of wide matrices as BF16; a `file` is a matrix's name."""

    divisible = False

    def __init__(self, store: Files, stored: Mapping[str, TensorInfo]) -> None:
        self._store = store
        self._stored = dict(stored)

    @property
    def uri(self) -> str:
        """Where the matrices are stored."""
        return self._store.uri

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Bytes [start, stop) of each range of a matrix in BF16; KeyError when there is none of that name."""
        info = self._stored[file]
        # Whole numbers around each range.
        around = [(start - start % 2, stop + stop % 2) for start, stop in ranges]
        found = self._store.get_ranges(
            info.file, [(info.start + 2 * start, info.start + 2 * stop) for start, stop in around]
        )
        decoded: list[Buffer] = []
        for buffer, (start, stop), (first, _) in zip(found, ranges, around, strict=True):
            data = narrowed(buffer).view(torch.uint8).numpy().data if stop > start else b""
            decoded.append(data[start - first : stop - first])
        return decoded
