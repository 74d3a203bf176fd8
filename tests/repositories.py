"""Repositories of tiny models with round-to-nearest candidates: what tests of the writer and the verifier share."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prismaquant_ray.checkpoint.candidates import Candidates
from prismaquant_ray.checkpoint.reader import INDEX, Checkpoint
from prismaquant_ray.checkpoint.verify import VerifyReport, verify_repository
from prismaquant_ray.checkpoint.writer import MANIFEST, Repository, write_repository
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.models.inspect import build
from prismaquant_ray.rounding.scale_search import nearest
from prismaquant_ray.storage.record import write_tensors
from prismaquant_ray.storage.store import Store
from tests.tiny import make_checkpoint

Choice = dict[str, FormatName]


@dataclass(frozen=True)
class Model:
    """A source checkpoint with every candidate of it."""

    source: Checkpoint
    layout: Layout
    candidates: Candidates

    def write(self, output: Path, choice: Choice, *, shard: int = 5_000_000_000) -> Repository:
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
        """Linear name → its format and candidate tensors by suffix, for every quantized Linear."""
        found = {}
        for block in self.layout.blocks:
            for group in block.groups:
                name = choice[group.name]
                if FORMATS[name].codec is None:
                    continue
                file = self.candidates.file(block.index, name)
                for linear in group.linears:
                    tensors = file.read([info.name for info in file.of(name, linear)])
                    found[linear.name] = (name, {key.rpartition(".")[2]: value for key, value in tensors.items()})
        return found


def make_model(directory: Path, architecture: str, **arguments: Any) -> Model:
    source = Checkpoint(Store(make_checkpoint(directory / "source", architecture, **arguments)))
    layout = build(source)[1]
    return Model(source, layout, store_candidates(source, layout, Store(directory / "run")))


def store_candidates(source: Checkpoint, layout: Layout, store: Store) -> Candidates:
    artifacts = {}
    for block, name in itertools.product(layout.blocks, FORMATS):
        tensors: dict[str, Tensor] = {}
        for group in block.groups:
            weights = [source.read([linear.weight])[linear.weight].float() for linear in group.linears]
            if codec := FORMATS[name].codec:
                divisor = codec.global_scale(max(float(weight.abs().max()) for weight in weights))
                for linear, weight in zip(group.linears, weights, strict=True):
                    if FORMATS[name].refusal(linear.out_features, linear.in_features):
                        continue
                    packed = codec.pack(nearest(weight, codec, divisor))
                    if FORMATS[name].static_input_scale:
                        packed["input_global_scale"] = torch.tensor([96.0])
                    tensors |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in packed.items()}
        if tensors:
            key = f"forward/{block.key}/abc/{name}.safetensors"
            artifacts[block.index, name] = write_tensors(store, key, tensors)
    return Candidates(store, artifacts)


def uniform(layout: Layout, name: FormatName) -> Choice:
    return dict.fromkeys((group.name for group in layout.groups), name)


def mixed(layout: Layout, formats: Sequence[FormatName] = tuple(FormatName)) -> Choice:
    """Formats in turn, shifted from block to block, so that no place in a block has one format throughout."""
    return {
        group.name: formats[(index + layout.block_of[group.name].index) % len(formats)]
        for index, group in enumerate(layout.groups)
    }


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
    manifest["sha256"] = {file: hashlib.sha256((directory / file).read_bytes()).hexdigest() for file in files}
    (directory / MANIFEST).write_text(json.dumps(manifest))
