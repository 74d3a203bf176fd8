"""Repositories of tiny models with round-to-nearest candidates: what tests of the writer and the verifier share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import experts_of
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.forward.candidates import Candidates
from prismaquant_ray.forward.scale_search import nearest
from prismaquant_ray.layout import Layout, LinearSpec, Matrix
from prismaquant_ray.model.layout_builder import Scope, build_layout
from prismaquant_ray.repository.manifest import MANIFEST
from prismaquant_ray.repository.verify import VerifyReport, verify_repository
from prismaquant_ray.repository.writer import WrittenRepository, write_repository
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.files import INDEX
from prismaquant_ray.storage.record import write_tensors
from prismaquant_ray.storage.store import Store
from tests.tiny import make_checkpoint
from tests.tiny_families import FAMILIES, VISION_FAMILIES, make_family

Choice = dict[str, FormatName]
#: Formats that the shapes of tiny models take; tests/jobs/test_other_formats.py has all.
SEVEN = tuple(map(FormatName, ("INT4", "MXFP4", "NVFP4", "NVFP4A16", "FP8", "MXFP8", "BF16")))
#: The formats of the configurations of tests.
DEFAULT_FORMATS = (FormatName.NVFP4, FormatName.MXFP8, FormatName.BF16)
INPUT_DIVISOR = 96.0


@dataclass(frozen=True)
class Model:
    """A source checkpoint with every candidate of it."""

    source: Checkpoint
    layout: Layout
    candidates: Candidates

    def write(self, output: Path, choice: Choice, *, shard: int = 5_000_000_000) -> WrittenRepository:
        return write_repository(
            self.source,
            self.layout,
            choice,
            self.candidates,
            Store(output),
            max_shard_bytes=shard,
            manifest={"target": "bpp=5"},
        )

    def verify(self, output: Path, choice: Choice, *, stored: bool = True) -> VerifyReport:
        candidates = self.candidates if stored else None
        return verify_repository(Store(output, create=False), self.source, self.layout, choice, candidates)

    def stored(self, choice: Choice) -> dict[str, tuple[FormatName, dict[str, Tensor]]]:
        """Module name → its format and candidate tensors by suffix, for every quantized Linear of every expert."""
        found = {}
        for block in self.layout.blocks:
            for group in block.groups:
                name = choice[group.name]
                if FORMATS[name].codec is None:
                    continue
                file = self.candidates.file(block.index, name)
                for linear in group.linears:
                    for module, infos in file.of(name, linear).items():
                        tensors = file.read([info.name for info in infos])
                        found[module] = name, {key.rpartition(".")[2]: value for key, value in tensors.items()}
        return found

    def weights(self) -> dict[str, Tensor]:
        """Module name → its weight in the source, for every Linear of every expert."""
        found = {}
        for group in self.layout.groups:
            for matrix in group.matrices:
                for linear, weight in zip(matrix.linears, weights_of(self.source, matrix), strict=True):
                    found |= zip(linear.names, [weight] if linear.experts is None else weight, strict=True)
        return found


def make_model(directory: Path, name: str, *, scope: Scope | None = None, **arguments: Any) -> Model:
    """A model of an architecture of `tests.tiny`, or of a family of `tests.tiny_families`.

    Of a family everything is quantizable that can be, unless `scope` says otherwise.
    """
    make = make_family if name in FAMILIES else make_checkpoint
    source = Checkpoint(Store(make(directory / "source", name, **arguments)))
    if scope is None:
        scope = everything(source, name) if name in FAMILIES else Scope()
    layout = build_layout(source, scope)[1]
    return Model(source, layout, store_candidates(source, layout, Store(directory / "run")))


def everything(source: Checkpoint, family: str) -> Scope:
    """The vision tower, and the output head but where it must stay."""
    tied = source.config.get("tie_word_embeddings", False)
    return Scope(images=family in VISION_FAMILIES, head=family != "gpt_oss" and not tied)


def weights_of(source: Checkpoint, matrix: Matrix) -> list[Tensor]:
    """The weights of a matrix's Linears as the source has them: (O, I), or (E, O, I) of every expert."""
    return [_weight(source, linear, rows) for linear, rows in zip(matrix.linears, matrix.rows, strict=True)]


def _weight(source: Checkpoint, linear: LinearSpec, rows: slice) -> Tensor:
    read = source.read(linear.sources)
    tensors = [read[name] for name in linear.sources]
    if linear.experts is None:
        return tensors[0]
    return tensors[0][:, rows] if len(tensors) == 1 else torch.stack(tensors)


def store_candidates(source: Checkpoint, layout: Layout, store: Store) -> Candidates:
    """Every Linear of every expert in every format it can take, rounded to nearest."""
    artifacts = {}
    for block in layout.blocks:
        tensors: dict[FormatName, dict[str, Tensor]] = {}
        for group in block.groups:
            for matrix in group.matrices:
                weights = [weight.float() for weight in weights_of(source, matrix)]
                for name in formats_of(group, tuple(FORMATS)):
                    if FORMATS[name].codec is not None:
                        tensors.setdefault(name, {}).update(_candidates(name, matrix, weights))
        for name, found in tensors.items():
            key = f"forward/{block.key}/abc/{name}.safetensors"
            artifacts[block.index, name] = write_tensors(store, key, found)
    return Candidates(store, artifacts)


def _candidates(name: FormatName, matrix: Matrix, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    codec = FORMATS[name].codec
    assert codec is not None
    # One divisor for the whole matrix, or one for each expert's.
    amax = torch.cat(list(weights), dim=-2).abs().amax((-2, -1))
    divisor = codec.global_scale(float(amax) if matrix.experts is None else amax.view(-1, 1, 1))
    found = {}
    for linear, weight in zip(matrix.linears, weights, strict=True):
        packed = codec.pack(nearest(weight, codec, divisor))
        for module, tensors in zip(linear.names, experts_of(packed) if linear.experts else [packed], strict=True):
            if FORMATS[name].static_input_scale:
                tensors["input_global_scale"] = torch.tensor([INPUT_DIVISOR])
            found |= {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return found


def uniform(layout: Layout, name: FormatName) -> Choice:
    return dict.fromkeys((group.name for group in layout.groups), name)


def mixed(layout: Layout, formats: Sequence[FormatName] = SEVEN) -> Choice:
    """Formats in turn, shifted from block to block, so that no place in a block has one format throughout.

    A group's turn is among the formats that it can take.
    """
    choice = {}
    for index, group in enumerate(layout.groups):
        possible = formats_of(group, formats)
        choice[group.name] = possible[(index + layout.block_of[group.name].index) % len(possible)]
    return choice


def mixed_choice(layout: Layout) -> Choice:
    """Every default format in turn, as `mixed` does."""
    return mixed(layout, DEFAULT_FORMATS)


def shards(directory: Path) -> dict[str, dict[str, Tensor]]:
    return {file.name: load_file(file) for file in sorted(directory.glob("*.safetensors"))}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in shards(directory).values() for name, tensor in shard.items()}


def rewrite(directory: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Change, add or (None) remove tensors of a repository, keeping index and manifest consistent with the files."""
    files = shards(directory)
    place = {name: file for file, tensors in files.items() for name in tensors}
    for name, tensor in changes.items():
        holder = files[place.get(name, min(files))]
        holder.pop(name, None)
        if tensor is not None:
            holder[name] = tensor
    for file, tensors in files.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"] = {name: (directory / name).stat().st_size for name in manifest["files"]}
    digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in manifest["files"]}
    manifest["sha256"] = digests
    (directory / MANIFEST).write_text(json.dumps(manifest))
