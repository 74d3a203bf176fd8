"""Protocols of a model's source: a checkpoint, its configuration alone, or a decoded quantized repository."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.source.header import TensorInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from prismaquant_ray.source.block_fp8 import ScaledWeight
    from prismaquant_ray.storage.prefix import Files

# A repository may hold its weights more than once (pytorch_model.bin, consolidated.safetensors, a GGUF, …).
_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_WEIGHTS = tuple(suffix + end for suffix in _FORMATS for end in ("", ".index.json"))


class ByteSource(Protocol):
    """Byte ranges of files: a store, or a decoder on top of one."""

    @property
    def uri(self) -> str:
        """Where it is, for errors."""

    @property
    def divisible(self) -> bool:
        """Whether part of a tensor can be read alone; decoded tensors are read whole."""

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]], /) -> list[Buffer]:
        """Bytes [start, stop) of each range."""


#: The source of a tensor's file, and the tensor.
Piece = tuple[ByteSource, TensorInfo]


class TensorSource(Protocol):
    """A model: its configuration, its tensors by name, in order, and the files beside them.

    Raises InputError for a tensor that does not exist or cannot be read.
    """

    @property
    def store(self) -> Files:
        """Where its files are."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the model that the tensors are of."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor as it is read."""

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """Every tensor as the files have it."""

    @property
    def blocks(self) -> Mapping[str, ScaledWeight]:
        """Weights that the files have as FP8 in blocks, and that are read as these decode."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors in their own dtype."""

    def piece(self, name: str) -> Piece:
        """A tensor's bytes, as `read_pieces` takes them."""

    def other_files(self) -> list[str]:
        """Top-level files that are not weights of any kind."""

    def fingerprint(self) -> str:
        """SHA-256 that identifies the model."""


def tensor_info(source: TensorSource, name: str) -> TensorInfo:
    """A tensor of the model; InputError when there is none of that name."""
    if name not in source.tensors:
        raise InputError(f"{source.store.uri}: tensor {name} is missing; the checkpoint is incomplete")
    return source.tensors[name]


def tensor_of_shape(source: TensorSource, name: str, shape: tuple[int, ...]) -> str:
    """The name; InputError unless the model has a tensor of that name and shape."""
    info = tensor_info(source, name)
    if info.shape != shape:
        raise InputError(
            f"{source.store.uri}: {name} has shape {info.shape}, the configuration says {shape}; config.json and the "
            "weights do not belong together"
        )
    return name


# Folders whose files belong to a model; others hold other forms of it (original/, onnx/) or nothing that is loaded.
_FOLDERS = ("additional_chat_templates/",)


def files_beside_weights(store: Files) -> list[str]:
    """Files that are not weights of any kind: tokenizer, configuration, chat templates, licence, …"""
    return [
        key
        for key in store.list()
        if ("/" not in key or (key.startswith(_FOLDERS) and key.count("/") == 1)) and not key.endswith(_WEIGHTS)
    ]
