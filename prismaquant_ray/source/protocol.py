"""What a model's tensors are read from: a checkpoint, its configuration alone, or a quantized repository decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.source.header import TensorInfo
from prismaquant_ray.storage.store import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

# A repository may hold its weights more than once (pytorch_model.bin, consolidated.safetensors, a GGUF, …).
_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_WEIGHTS = tuple(suffix + end for suffix in _FORMATS for end in ("", ".index.json"))


class ByteSource(Protocol):
    """What gives bytes of named things: a store, or something that decodes what one holds."""

    @property
    def uri(self) -> str:
        """Where it is, for errors."""

    @property
    def divisible(self) -> bool:
        """Whether part of a tensor can be read alone; what is decoded is asked for whole."""

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]], /) -> list[Buffer]:
        """Bytes [start, stop) of each range."""


#: A tensor and what holds its file.
Piece = tuple[ByteSource, TensorInfo]


class TensorSource(Protocol):
    """A model: its configuration, its tensors by name, in order, and the files beside them.

    InputError for a tensor that there is none of, or that cannot be read.
    """

    @property
    def store(self) -> Store:
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

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors in their own dtype."""

    def piece(self, name: str) -> Piece:
        """A tensor's bytes, as `read_pieces` takes them."""

    def other_files(self) -> list[str]:
        """Top-level files that are not weights of any kind."""

    def fingerprint(self) -> str:
        """SHA-256 that another model does not have."""


def tensor_info(source: TensorSource, name: str) -> TensorInfo:
    """A tensor of the model; InputError when there is none of that name."""
    if name not in source.tensors:
        raise InputError(f"{source.store.uri}: tensor {name} is missing; the checkpoint is incomplete")
    return source.tensors[name]


def files_beside_weights(store: Store) -> list[str]:
    """Top-level files that are not weights of any kind: tokenizer, configuration, licence, …"""
    return [key for key in store.list() if "/" not in key and not key.endswith(_WEIGHTS)]
