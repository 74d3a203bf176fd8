"""The safetensors header, read as untrusted input.

Source: the safetensors format: 8 bytes little-endian header length, a JSON object of
name → {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.parsing import MalformedError, as_object, parse_json

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own bound; a larger length is a damaged or hostile file.
MAX_HEADER = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor of a file; `start` and `stop` are byte offsets from the beginning of the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return self.stop - self.start


def header_length(prefix: bytes, file: str, file_size: int) -> int:
    """Length of the JSON header from a file's first 8 bytes; InputError when it cannot be one."""
    if len(prefix) < 8:
        raise InputError(f"{file}: not a safetensors file ({file_size} bytes); fetch it again")
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= min(MAX_HEADER, file_size - 8):
        raise InputError(
            f"{file}: header of {length} bytes in a file of {file_size}: cut short or not safetensors; fetch it again"
        )
    return length


def parse_header(header: bytes, file: str, file_size: int) -> list[TensorInfo]:
    """Every tensor of a file, in data order. All checks come before any allocation.

    Raises:
        InputError: unknown dtypes, offsets outside the file, sizes that do not match the shape, overlaps, gaps, or data
            that ends before or after the file does.
    """
    try:
        body = as_object(parse_json(header, unique=True))
    except MalformedError as error:
        raise InputError(f"{file}: its header {error}; fetch the file again") from error
    base = 8 + len(header)
    infos = [_entry(file, name, entry, base) for name, entry in body.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.start, info.stop))
    position = base
    for info in infos:
        if info.start != position:
            raise InputError(f"{file}: {info.name} starts at byte {info.start}, {position} expected (overlap or gap)")
        position = info.stop
    if position != file_size:
        raise InputError(f"{file}: cut short or padded: header describes {position} bytes, the file has {file_size}")
    return infos


def _entry(file: str, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: entry of tensor {name!r} is malformed; fetch the file again") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{file}: {name} has dtype {dtype!r}, which is not supported (known: {', '.join(DTYPES)})")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError(f"{file}: {name} has shape {shape} and offsets {start}, {stop}; fetch the file again")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise InputError(f"{file}: {name} has {stop - start} bytes for shape {tuple(shape)} of {dtype}")
    return TensorInfo(name=name, file=file, dtype=dtype, shape=tuple(shape), start=base + start, stop=base + stop)


def build_header(entries: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """Length prefix and header for tensors (dtype, shape, bytes) in the given order, padded to 8 bytes."""
    body: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, nbytes) in entries.items():
        body[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_tensor(buffer: object, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that owns its bytes."""
    view = memoryview(buffer)  # type: ignore[arg-type]
    if view.nbytes == 0:
        return torch.empty(shape, dtype=DTYPES[dtype])
    # bytearray: torch warns about read-only buffers.
    return torch.frombuffer(bytearray(view), dtype=DTYPES[dtype]).reshape(shape)
