"""A model without its weights: names and shapes from the configuration alone, to plan before anything is fetched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.families import family_of
from prismaquant_ray.model.layout_builder import architecture_of, transformers_config
from prismaquant_ray.model.meta_model import MetaModel
from prismaquant_ray.model.mtp_head import DraftHead
from prismaquant_ray.model.on_meta import build_on_meta
from prismaquant_ray.source.block_fp8 import ScaledWeight
from prismaquant_ray.source.checkpoint import read_config, read_json
from prismaquant_ray.source.files import INDEX, SINGLE
from prismaquant_ray.source.header import TensorInfo
from prismaquant_ray.source.protocol import Piece, files_beside_weights
from prismaquant_ray.storage.prefix import Files


class ConfigOnlyCheckpoint:
    """A directory with config.json and perhaps the index, but no weights: every tensor is taken to be BF16.

    It answers questions about tensors and cannot read any: that is InputError. Experts are taken to be packed.
    """

    def __init__(self, store: Files) -> None:
        self.store = store
        self.config = read_config(store)
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape in _shapes(self):
            self.tensors[name] = TensorInfo(
                name=name, file="", dtype="BF16", shape=shape, start=0, stop=2 * math.prod(shape)
            )

    @classmethod
    def fits(cls, store: Files) -> bool:
        """Whether a place holds a configuration and no weights."""
        if store.size("config.json") is None or store.size(SINGLE) is not None:
            return False
        return not any(key.endswith(".safetensors") for key in store.list())

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """As the files would have them."""
        return self.tensors

    @property
    def blocks(self) -> dict[str, ScaledWeight]:
        """None: only files say so."""
        return {}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """InputError."""
        raise self._no_weights(next(iter(names), INDEX))

    def piece(self, name: str) -> Piece:
        """InputError."""
        raise self._no_weights(name)

    def fingerprint(self) -> str:
        """InputError."""
        raise self._no_weights(INDEX)

    def other_files(self) -> list[str]:
        """Top-level files that are not weights of any kind."""
        return files_beside_weights(self.store)

    def unexplained(self) -> list[str]:
        """Names in the index that the configuration does not imply; experts stored one by one are left out."""
        if self.store.size(INDEX) is None:
            return []
        names = read_json(self.store, INDEX).get("weight_map")
        if not isinstance(names, dict):
            return []
        return [name for name in names if name not in self.tensors and ".experts." not in name]

    def _no_weights(self, wanted: str) -> InputError:
        return InputError(f"{self.store.uri} has a configuration and no weights; fetch {wanted} and the rest first")


def _shapes(checkpoint: ConfigOnlyCheckpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    architecture = architecture_of(checkpoint)
    config = transformers_config(checkpoint)
    family = family_of(architecture)
    model = build_on_meta(config, architecture)
    persistent = (
        (f"{path}.{name}" if path else name, buffer)
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    )
    for name, tensor in (*model.named_parameters(), *persistent):
        yield family.checkpoint_name(name) if family else name, tuple(tensor.shape)
    text = checkpoint.config.get("text_config") or checkpoint.config
    if family is not None and family.draft is not None and text.get("mtp_num_hidden_layers"):
        meta_model = MetaModel(config, architecture, blocks_path=family.blocks, vision=family.vision)
        for name, tensor in DraftHead(meta_model).state_dict().items():
            yield f"{family.draft}.{name}", tuple(tensor.shape)
