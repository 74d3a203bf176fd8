"""The stored candidates of a run: one safetensors object per block and format, read by ranges."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor

from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Rounded
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE
from prismaquant_ray.layout import FusedGroup, LinearSpec
from prismaquant_ray.source.checkpoint import read_header
from prismaquant_ray.source.header import DTYPE_NAMES, TensorInfo, as_tensor
from prismaquant_ray.source.ranges import BATCH_BYTES, threads
from prismaquant_ray.storage.prefix import Prefix
from prismaquant_ray.storage.record import Artifact, damaged
from prismaquant_ray.storage.store import Store


def shipped(name: FormatName, linear: LinearSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix → (dtype, shape) of everything a Linear (of each expert) ships in a format; empty for BF16.

    The set must be exact: vLLM refuses an unexpected tensor and does not notice a missing one.
    """
    return _shipped(name, linear.out_features, linear.in_features)


@functools.cache
def _shipped(name: FormatName, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    spec = FORMATS[name]
    if spec.codec is None:
        return {}
    # The codec packs a weight on the meta device, so that names, dtypes and shapes are defined once.
    divisor = spec.codec.global_scale(1.0)
    divisor = divisor.to("meta") if divisor is not None else None
    amax = torch.empty(out_features, in_features // spec.codec.width(in_features), device="meta")
    values = torch.empty(out_features, in_features, device="meta")
    scale = spec.codec.nearest_scale(amax, divisor)
    tensors = spec.codec.pack(Rounded(values=values, scale=scale, global_scale=divisor))
    found = {suffix: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for suffix, tensor in tensors.items()}
    return {**found, INPUT_GLOBAL_SCALE: ("F32", (1,))} if spec.static_input_scale else found


class CandidateFile:
    """One artifact. Opening reads its header; `tensors` maps shipped names to where they are."""

    def __init__(self, store: Store, artifact: Artifact) -> None:
        self.store = store
        self.artifact = artifact
        size = store.size(artifact.key)
        if size != artifact.size:
            raise self._damaged("is missing" if size is None else f"has {size} bytes, {artifact.size} recorded")
        try:
            self.tensors: dict[str, TensorInfo] = {info.name: info for info in read_header(store, artifact.key)}
        except InputError as error:
            raise self._damaged(f"cannot be parsed: {error}") from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors in their own dtype, by one ranged request."""
        infos = [self.tensors[name] for name in names]
        buffers = self.store.get_ranges(self.artifact.key, [(info.start, info.stop) for info in infos])
        pairs = zip(infos, buffers, strict=True)
        return {info.name: as_tensor(buffer, info.dtype, info.shape) for info, buffer in pairs}

    def of(self, name: FormatName, linear: LinearSpec) -> dict[str, list[TensorInfo]]:
        """Shipped tensors of a Linear by module, in file order; StoreError unless they are those of the format."""
        expected = shipped(name, linear)
        found = {module: self._by_module.get(module, []) for module in linear.names}
        for module, infos in found.items():
            if {info.name.removeprefix(f"{module}."): (info.dtype, info.shape) for info in infos} != expected:
                raise self._damaged(f"does not hold {module} as {name} stores it")
        return found

    @functools.cached_property
    def _by_module(self) -> dict[str, list[TensorInfo]]:
        found: dict[str, list[TensorInfo]] = {}
        for name, info in self.tensors.items():
            found.setdefault(name.rpartition(".")[0], []).append(info)
        return found

    def check(self) -> None:
        """StoreError unless the whole object has the recorded digest. Reads all of it, a piece at a time."""
        if stored_digest(self.store, self.artifact.key, self.artifact.size) != self.artifact.sha256:
            raise self._damaged("has another digest than recorded")

    def _damaged(self, what: str) -> StoreError:
        return damaged(self.store, self.artifact, what)


class Candidates:
    """Every candidate of a run, by block index and format. Files are opened when first asked for."""

    def __init__(self, store: Store, artifacts: Mapping[tuple[int, FormatName], Artifact]) -> None:
        self.store = store
        self.artifacts = dict(artifacts)
        self._open: dict[tuple[int, FormatName], CandidateFile] = {}

    def file(self, block: int, name: FormatName) -> CandidateFile:
        """The candidates of a block in a format; StoreError when there are none."""
        key = (block, name)
        if key not in self.artifacts:
            raise StoreError(f"{self.store.uri}: block {block} has no {name} candidates; add the format and run again")
        if key not in self._open:
            self._open[key] = CandidateFile(self.store, self.artifacts[key])
        return self._open[key]

    def read(self, block: int, name: FormatName, group: FusedGroup) -> dict[str, Tensor]:
        """Everything that a fused group ships in a format, by tensor name."""
        file = self.file(block, name)
        infos = [info for linear in group.linears for found in file.of(name, linear).values() for info in found]
        return file.read(info.name for info in infos)

    def check(self, used: Iterable[tuple[int, FormatName]]) -> None:
        """StoreError for the first of these files, by block and format, that is not as it was recorded."""
        files = [self.file(block, name) for block, name in used]
        with ThreadPoolExecutor(threads(), thread_name_prefix="digest") as pool:
            for _ in pool.map(CandidateFile.check, files):
                pass


def stored_digest(store: Prefix, key: str, size: int) -> str:
    """SHA-256 of an object, read a piece at a time."""
    digest = hashlib.sha256()
    for start, stop in pairwise([*range(0, size, BATCH_BYTES), size]):
        digest.update(store.get_ranges(key, [(start, stop)])[0])
    return digest.hexdigest()
