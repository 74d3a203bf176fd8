"""Reading a Hugging Face checkpoint by tensor ranges: nothing is loaded that is not asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.parsing import MalformedError, as_object
from prismaquant_ray.serialization import from_json
from prismaquant_ray.source import block_fp8
from prismaquant_ray.source.config_json import portable
from prismaquant_ray.source.files import CONFIG, INDEX, SINGLE
from prismaquant_ray.source.header import TensorInfo, as_tensor, header_length, parse_header
from prismaquant_ray.source.protocol import Piece, files_beside_weights, tensor_info
from prismaquant_ray.source.wide import Bf16Decoder, as_bf16, narrowed, wide_matrices, with_bf16
from prismaquant_ray.storage.prefix import Files, Objects, get_json

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HEADERS_AT_ONCE = 8
_SAMPLE = 4096
# Tensors: eight megabytes of samples.
_SAMPLED_AT_ONCE = 1000
_PREFIX, _EMBEDDING = "model.", "embed_tokens.weight"
# model-00001-of-00002.safetensors
_SHARD = re.compile(r"([^/]+)-(\d+)-of-(\d+)\.safetensors")


def read_header(store: Objects, file: str) -> list[TensorInfo]:
    """Every tensor of a safetensors file, in data order; KeyError when it is absent, InputError when it is damaged."""
    size = store.size(file)
    if size is None:
        raise KeyError(file)
    path = f"{store.uri}/{file}"
    length = header_length(bytes(store.get_ranges(file, [(0, min(8, size))])[0]), path, size)
    infos = parse_header(bytes(store.get_ranges(file, [(8, 8 + length)])[0]), path, size)
    # Errors name the whole path; the entries hold the key.
    return [replace(info, file=file) for info in infos]


def read_json(store: Files, name: str) -> dict[str, Any]:
    """A JSON object of a model's directory; InputError when it is absent or is something else."""
    try:
        return as_object(get_json(store, name))
    except KeyError as error:
        raise InputError(f"{store.uri}: no {name}; is this a Hugging Face model directory?") from error
    except MalformedError as error:
        raise InputError(f"{store.uri}: {name} {error}; fetch it again") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Named:
    """Values of config.json that are read here and not by transformers, which checks its own."""

    architectures: list[str] | None = None
    text_config: dict[str, Any] | None = None


def read_config(store: Files) -> dict[str, Any]:
    """The config.json of a model, as every reader takes it; InputError when it is absent or is something else."""
    body = portable(read_json(store, CONFIG))
    try:
        from_json(_Named, body)
    except ValueError as error:
        raise InputError(f"{store.uri}: {CONFIG}: {error}; fetch it again") from error
    return body


class Checkpoint:
    """A directory of safetensors files with its config.json.

    `tensors` describes every tensor, in file order, `config` the model. Weights stored as block FP8 appear decoded, as
    BF16; their scales and the `quantization_config` are hidden. `stored` and `source_config` describe the files as they
    are; `piece` gives the source of a tensor's bytes. A decoder stored without the prefix `model.` appears with it, as
    transformers adds it on loading and servers want it.

    Opening reads headers only.

    Raises:
        InputError: a file is missing or damaged, the index disagrees with the files, a file name is unsafe, or FP8
            cannot be decoded.
    """

    def __init__(self, store: Files) -> None:
        self.store = store
        self.source_config = read_config(store)
        self.files = self._files()
        self.stored: dict[str, TensorInfo] = {}
        # At once: a header of a remote file takes as long as its way there and back, twice.
        with ThreadPoolExecutor(_HEADERS_AT_ONCE, thread_name_prefix="headers") as pool:
            for info in chain.from_iterable(pool.map(self._header, self.files)):
                if info.name in self.stored:
                    both = f"{self.stored[info.name].file} and {info.file}"
                    raise InputError(f"{store.uri}: {info.name} is in both {both}")
                self.stored[info.name] = info
        self._check_index()
        if _lacks_prefix(self.stored):
            self.stored = {name: replace(info, name=name) for name, info in _prefixed(self.stored)}
        block = block_fp8.block_of(self.source_config, store.uri)
        if block is None:
            block_fp8.check_unquantized(self.source_config, self.stored.values(), store.uri)
        self.config = self.source_config if block is None else block_fp8.without_block_fp8(self.source_config)
        self._scaled = block_fp8.pair(self.stored, block, store.uri) if block else {}
        self._decoder = block_fp8.BlockFp8Decoder(store, self._scaled)
        scales = {scaled.scale.name for scaled in self._scaled.values()}
        # Of a quantized checkpoint the scheme says what a tensor is.
        unquantized = block_fp8.KEY not in self.config
        self._wide = wide_matrices(info for info in self.stored.values() if info.name not in scales and unquantized)
        self._narrow = Bf16Decoder(store, self._wide)
        if self._wide:
            self.config = with_bf16(self.config)
        self.tensors: dict[str, TensorInfo] = {
            name: self._read_as(info) for name, info in self.stored.items() if name not in scales
        }

    def _read_as(self, info: TensorInfo) -> TensorInfo:
        if info.name in self._scaled:
            return self._scaled[info.name].info
        return as_bf16(info) if info.name in self._wide else info

    def _files(self) -> tuple[str, ...]:
        self._index: dict[str, str] | None = None
        if self.store.size(INDEX) is not None:
            weight_map = read_json(self.store, INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise InputError(f"{self.store.uri}: {INDEX} has no weight_map; fetch it again")
            unsafe = next(
                (f for f in weight_map.values() if "/" in f or "\\" in f or not f.endswith(".safetensors")), None
            )
            if unsafe is not None:
                raise InputError(
                    f"{self.store.uri}: {INDEX} names {unsafe!r}; only .safetensors files beside it are read"
                )
            self._index = weight_map
            return tuple(sorted(set(weight_map.values())))
        if self.store.size(SINGLE) is not None:
            return (SINGLE,)
        return self._shards()

    def _shards(self) -> tuple[str, ...]:
        """The files of a checkpoint without an index: every one says how many there are."""
        found = {key: match for key in self.store.list() if (match := _SHARD.fullmatch(key))}
        if not found:
            raise InputError(f"{self.store.uri}: neither {SINGLE} nor {INDEX}; convert the model to safetensors first")
        kinds = {(match[1], match[3]) for match in found.values()}
        if len(kinds) > 1:
            raise InputError(
                f"{self.store.uri}: {min(found)} and {max(found)} belong to different checkpoints and there is no "
                f"{INDEX}; remove one, or fetch the index"
            )
        ((stem, count),) = kinds
        wanted = (
            f"{stem}-{str(number).zfill(len(count))}-of-{count}.safetensors" for number in range(1, int(count) + 1)
        )
        missing = next((file for file in wanted if file not in found), None)
        if missing is not None:
            raise InputError(f"{self.store.uri}: {missing} is missing, and there is no {INDEX}; fetch it")
        return tuple(sorted(found))

    def _header(self, file: str) -> list[TensorInfo]:
        try:
            return read_header(self.store, file)
        except KeyError as error:
            raise InputError(f"{self.store.uri}: {file} is in {INDEX} but not there; fetch it again") from error

    def _check_index(self) -> None:
        if self._index is None:
            return
        for name, file in self._index.items():
            if name not in self.stored or self.stored[name].file != file:
                raise InputError(f"{self.store.uri}: {INDEX} places {name} in {file}, which does not hold it")

    @property
    def blocks(self) -> Mapping[str, block_fp8.ScaledWeight]:
        """Weights that the files have as FP8 in blocks."""
        return self._scaled

    def piece(self, name: str) -> Piece:
        """A tensor's bytes, as read_pieces takes them."""
        info = tensor_info(self, name)
        if name in self._wide:
            return self._narrow, info
        return self._decoder if name in self._scaled else self.store, info

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors in their own dtype, one ranged request per file."""
        waiting = {name: self._parts(name) for name in names}
        by_file: dict[str, list[TensorInfo]] = {}
        for parts in waiting.values():
            for part in parts:
                by_file.setdefault(part.file, []).append(part)
        loaded: dict[str, Tensor] = {}
        held: dict[str, Buffer] = {}
        for file, infos in by_file.items():
            buffers = self.store.get_ranges(file, [(info.start, info.stop) for info in infos])
            held |= zip((info.name for info in infos), buffers, strict=True)
            del buffers
            # A weight may be in another file than its scales.
            for name in [name for name, parts in waiting.items() if all(part.name in held for part in parts)]:
                loaded[name] = self._tensor(name, [held.pop(part.name) for part in waiting.pop(name)])
        return loaded

    def _parts(self, name: str) -> list[TensorInfo]:
        """The stored tensors that a tensor is made of."""
        info = tensor_info(self, name)
        if name in self._wide:
            return [self._wide[name]]
        return [self._scaled[name].weight, self._scaled[name].scale] if name in self._scaled else [info]

    def _tensor(self, name: str, buffers: Sequence[Buffer]) -> Tensor:
        info = self.tensors[name]
        if name in self._wide:
            return narrowed(buffers[0]).reshape(info.shape) if info.nbytes else torch.empty(info.shape).bfloat16()
        if name not in self._scaled:
            return as_tensor(buffers[0], info.dtype, info.shape)
        scaled = self._scaled[name]
        return scaled.decode(0, scaled.rows, buffers[0], buffers[1], self.store.uri).reshape(info.shape)

    def other_files(self) -> list[str]:
        """Top-level files that are not weights of any kind: tokenizer, configuration, licence, …"""
        return files_beside_weights(self.store)

    def fingerprint(self) -> str:
        """SHA-256 over config, every header entry and the first and last 4 KiB of every tensor.

        Cheap enough for remote sources (no full read), yet a fine-tuned copy with equal headers differs.
        """
        digest = hashlib.sha256(json.dumps(self.source_config, sort_keys=True).encode())
        ordered = sorted(self.stored.values(), key=lambda info: info.name)
        for info in ordered:
            digest.update(f"{info.name} {info.dtype} {info.shape}\n".encode())
        # Neighbours by name are mostly in one file. All samples of many experts at once would be hundreds of megabytes.
        for start in range(0, len(ordered), _SAMPLED_AT_ONCE):
            batch = ordered[start : start + _SAMPLED_AT_ONCE]
            samples = self._sampled(batch)
            for info in batch:
                digest.update(samples[info.name])
        return digest.hexdigest()

    def _sampled(self, batch: Sequence[TensorInfo]) -> dict[str, bytes]:
        """First and last bytes of tensors, by name."""
        by_file: dict[str, list[TensorInfo]] = {}
        for info in batch:
            by_file.setdefault(info.file, []).append(info)
        samples: dict[str, bytes] = {}
        for file, infos in by_file.items():
            ranges = [span for info in infos for span in _samples(info)]
            buffers = iter(self.store.get_ranges(file, ranges)) if ranges else iter(())
            for info in infos:
                samples[info.name] = b"".join(bytes(next(buffers)) for _ in _samples(info))
        return samples


def _lacks_prefix(names: Collection[str]) -> bool:
    """Whether a decoder was saved by itself, and an output head perhaps beside it."""
    return _EMBEDDING in names and not any(name.startswith(_PREFIX) for name in names)


def _prefixed(stored: Mapping[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
    for name, info in stored.items():
        yield name if name.startswith("lm_head.") else f"{_PREFIX}{name}", info


def _samples(info: TensorInfo) -> Sequence[tuple[int, int]]:
    if info.nbytes == 0:
        return ()
    if info.nbytes <= 2 * _SAMPLE:
        return ((info.start, info.stop),)
    return ((info.start, info.start + _SAMPLE), (info.stop - _SAMPLE, info.stop))
