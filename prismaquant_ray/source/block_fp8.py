"""Weights stored as FP8 with a scale per block, decoded to BF16.

Source: DeepSeek-V3's inference/fp8_cast_bf16.py. Beside `X.weight` (F8_E4M3, out × in) stands `X.weight_scale_inv`
(⌈out/r⌉ × ⌈in/c⌉ for blocks of r × c); a weight is code · scale of its block in float32, rounded to BF16.
Leading dimensions (packed experts) are kept: each matrix has its own blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.source.header import DTYPES, TensorInfo
from prismaquant_ray.storage.prefix import Files

if TYPE_CHECKING:
    from typing_extensions import Buffer

Block = tuple[int, int]
KEY = "quantization_config"
SUFFIX = "_scale_inv"
_CODES = "F8_E4M3"
_SCALES = ("F32", "BF16", "F16")
# Weights decoded at a time, because intermediates are float32.
_ELEMENTS = 1 << 20
_VALUES = torch.arange(256, dtype=torch.uint8).view(DTYPES[_CODES]).float().numpy()


def _schemes(config: Mapping[str, Any]) -> list[Any]:
    """Every quantization_config: the model's, and its text model's in a multimodal one."""
    parts = (config, config.get("text_config"))
    return [part[KEY] for part in parts if isinstance(part, Mapping) and KEY in part]


def _is_fp8(scheme: object) -> bool:
    return isinstance(scheme, Mapping) and scheme.get("quant_method") == "fp8"


def block_of(config: Mapping[str, Any], uri: str) -> Block | None:
    """Rows and columns of a block; None when config.json does not say FP8, InputError when it is another FP8."""
    found = [scheme for scheme in _schemes(config) if _is_fp8(scheme)]
    if not found:
        return None
    scheme = found[0]
    for key, only in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if scheme.get(key, only) != only:
            raise InputError(
                f"{uri} is already quantized, with {key} {scheme[key]!r} in config.json; only {only!r} is decoded, "
                "start from the BF16 model"
            )
    block = scheme.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise InputError(
            f"{uri} is already quantized, with weight_block_size {block!r} in config.json; only FP8 in blocks of two "
            "positive sizes is decoded, start from the BF16 model"
        )
    return block[0], block[1]


def without_block_fp8(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the decoded model; a scheme that is not FP8 stays in it."""
    kept = {key: value for key, value in config.items() if key != KEY or not _is_fp8(value)}
    text = kept.get("text_config")
    if isinstance(text, dict) and _is_fp8(text.get(KEY)):
        kept["text_config"] = {key: value for key, value in text.items() if key != KEY}
    return kept


def check_unquantized(config: Mapping[str, Any], infos: Iterable[TensorInfo], uri: str) -> None:
    """InputError for FP8 tensors without a quantization_config. Other schemes are checked elsewhere."""
    if _schemes(config):
        return
    for info in infos:
        if info.dtype == _CODES:
            raise InputError(
                f"{uri}: {info.name} is {_CODES}, but config.json has no {KEY}; "
                "fetch config.json again or start from the BF16 model"
            )


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A weight and the scales of its blocks, as they are stored. Rows are numbered across the leading dimensions."""

    weight: TensorInfo
    scale: TensorInfo
    block: Block

    @property
    def info(self) -> TensorInfo:
        """The decoded tensor; its file is its own name."""
        name, shape = self.weight.name, self.weight.shape
        return TensorInfo(name=name, file=name, dtype="BF16", shape=shape, start=0, stop=2 * math.prod(shape))

    @property
    def rows(self) -> int:
        """Rows of all matrices."""
        return math.prod(self.weight.shape[:-1])

    def rows_of(self, start: int, stop: int) -> tuple[int, int]:
        """The rows that hold bytes [start, stop) of the decoded tensor."""
        if start >= stop:
            return 0, 0
        row_bytes = 2 * self.weight.shape[-1]
        return start // row_bytes, -(-stop // row_bytes)

    def spans(self, first: int, last: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where rows [first, last) and their scales are, in the files of the weight and of the scales."""
        if first == last:
            return (0, 0), (0, 0)
        width, wide = self.weight.shape[-1], self.scale.shape[-1] * DTYPES[self.scale.dtype].itemsize
        low, high = self._scale_row(first), self._scale_row(last - 1) + 1
        start, scales = self.weight.start, self.scale.start
        return (start + first * width, start + last * width), (scales + low * wide, scales + high * wide)

    def _scale_row(self, row: int) -> int:
        matrix, within = divmod(row, self.weight.shape[-2])
        return matrix * self.scale.shape[-2] + within // self.block[0]

    def decode(self, first: int, last: int, codes: Buffer, scales: Buffer, uri: str) -> Tensor:
        """Rows [first, last) from the bytes at `spans`. StoreError when bytes are missing, InputError for ∞ or NaN."""
        columns = self.weight.shape[-1]
        decoded = torch.empty(last - first, columns, dtype=torch.bfloat16)
        views = memoryview(codes).cast("B"), memoryview(scales).cast("B")
        for view, (start, stop), info in zip(views, self.spans(first, last), (self.weight, self.scale), strict=True):
            if view.nbytes != stop - start:
                raise StoreError(f"{uri}: {info.file} is shorter than its header says, at {info.name}")
        if decoded.numel() == 0:
            return decoded
        # bytearray: torch warns about read-only buffers.
        factors = torch.frombuffer(bytearray(views[1]), dtype=DTYPES[self.scale.dtype]).float()
        if not bool(factors.isfinite().all()):
            raise InputError(f"{uri}: {self.scale.name} is not finite; fetch {self.scale.file} again")
        factors = factors.reshape(-1, self.scale.shape[-1])
        low = self._scale_row(first)
        step = max(1, _ELEMENTS // columns)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            piece = np.frombuffer(views[0][(begin - first) * columns : (end - first) * columns], dtype=np.uint8)
            # A table: torch converts FP8 on a CPU several times slower.
            values = torch.from_numpy(_VALUES.take(piece).reshape(-1, columns))
            lines = factors[torch.tensor([self._scale_row(row) - low for row in range(begin, end)])]
            spread = lines.unsqueeze(-1).expand(-1, -1, self.block[1]).flatten(1)[:, :columns]
            decoded[begin - first : end - first] = values.mul_(spread)
        return decoded


def pair(infos: Mapping[str, TensorInfo], block: Block, uri: str) -> dict[str, ScaledWeight]:
    """Every FP8 weight with its scales; InputError for one without the other or with scales of another shape."""
    for name, info in infos.items():
        weight = infos.get(name.removesuffix(SUFFIX))
        if name.endswith(SUFFIX) and (weight is None or weight.dtype != _CODES):
            raise InputError(
                f"{uri}: {name} in {info.file} has no {_CODES} tensor {name.removesuffix(SUFFIX)} beside it; "
                "the checkpoint is incomplete, fetch it again"
            )
    found: dict[str, ScaledWeight] = {}
    for name, info in infos.items():
        if info.dtype != _CODES:
            continue
        scale = infos.get(name + SUFFIX)
        if scale is None:
            raise InputError(
                f"{uri}: {name} in {info.file} is {_CODES} without a tensor {name}{SUFFIX}; "
                "the checkpoint is incomplete, fetch it again"
            )
        if len(info.shape) < 2 or scale.dtype not in _SCALES:
            raise InputError(
                f"{uri}: {name} of shape {info.shape} with {scale.dtype} scales is not FP8 in blocks; "
                "start from the BF16 model"
            )
        grid = (-(-info.shape[-2] // block[0]), -(-info.shape[-1] // block[1]))
        if scale.shape != (*info.shape[:-2], *grid):
            raise InputError(
                f"{uri}: {scale.name} has shape {scale.shape}, {(*info.shape[:-2], *grid)} expected for {info.shape} "
                f"in blocks of {block[0]} × {block[1]}; config.json and the weights do not belong together"
            )
        found[name] = ScaledWeight(info, scale, block)
    return found


class BlockFp8Decoder:
    """The decoded bytes of block-scaled weights; a `file` is a weight's name. Reads and decodes the rows asked for."""

    divisible = False

    def __init__(self, store: Files, weights: Mapping[str, ScaledWeight]) -> None:
        self._store = store
        self._weights = dict(weights)

    @property
    def uri(self) -> str:
        """Where the weights are stored."""
        return self._store.uri

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Bytes [start, stop) of each range of a decoded weight; KeyError when there is none of that name."""
        scaled = self._weights[file]
        size = scaled.info.nbytes
        rows = [scaled.rows_of(start, min(stop, size)) for start, stop in ranges]
        spans = [scaled.spans(first, last) for first, last in rows]
        codes, scales = [span for span, _ in spans], [span for _, span in spans]
        if scaled.weight.file == scaled.scale.file:
            found = self._store.get_ranges(scaled.weight.file, [*codes, *scales])
        else:
            found = self._store.get_ranges(scaled.weight.file, codes)
            found += self._store.get_ranges(scaled.scale.file, scales)
        row_bytes = 2 * scaled.weight.shape[-1]
        decoded: list[Buffer] = []
        for index, (first, last) in enumerate(rows):
            rows_decoded = scaled.decode(first, last, found[index], found[len(rows) + index], self.uri)
            data = rows_decoded.view(-1).view(torch.uint8).numpy().data
            start, stop = ranges[index]
            decoded.append(data[start - first * row_bytes : stop - first * row_bytes] if last else b"")
        return decoded
