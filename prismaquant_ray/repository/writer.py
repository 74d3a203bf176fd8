"""Writing a model repository: bytes copied from the source and from the stored candidates, no arithmetic.

config.json is written last, so readers never see a partial model. `staging.staged_output` publishes only after
verification, and keeps an old local repository in place until the new one is complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from prismaquant_ray.cache_rounding import CacheScale, scale_tensors
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS
from prismaquant_ray.forward.candidates import Candidates
from prismaquant_ray.layout import Layout, LinearSpec
from prismaquant_ray.parsing import parse_json
from prismaquant_ray.repository.manifest import MANIFEST, MANIFEST_SCHEMA, README, as_json, claim, sizes_and_digests
from prismaquant_ray.repository.quantization_config import Choice, build_quantization_config
from prismaquant_ray.repository.shards import Output, write_shards
from prismaquant_ray.source.files import CONFIG, INDEX
from prismaquant_ray.source.in_memory import InMemory
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.storage.prefix import Prefix

#: Of a repository whose KV cache stays in 16 bits.
NO_CACHE: Mapping[str, CacheScale] = MappingProxyType({})
#: Files of the source that are rewritten.
REWRITTEN = (CONFIG, MANIFEST)
# Tensors counted in bits per parameter; the few scalars per matrix are not.
_COUNTED = ("weight", "weight_packed", "weight_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """Figures for the card: bytes of all shards, and bits as in `WrittenRepository`."""

    weight_bytes: int
    bpp: float
    bits_all_parameters: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenRepository:
    """A written repository.

    `files` maps every file to its bytes, `sha256` every shard to its digest. `bpp` is bits of codes and group
    scales per quantizable parameter; `bits_all_parameters` is bits of all tensors per parameter of the model.
    """

    files: dict[str, int]
    sha256: dict[str, str]
    total_bytes: int
    bpp: float
    bits_all_parameters: float


def write_repository(
    source: TensorSource,
    layout: Layout,
    choice: Choice,
    candidates: Candidates,
    output: Prefix,
    *,
    cache: Mapping[str, CacheScale] = NO_CACHE,
    max_shard_bytes: int = 5_000_000_000,
    manifest: Mapping[str, Any],
    card: Callable[[Written], bytes] | None = None,
) -> WrittenRepository:
    """Write the repository for a choice; `manifest` goes into prismaquant.json under `run`.

    `cache` has the scales of an FP8 KV cache by attention; without any the cache stays in 16 bits. `card` makes
    README.md; without it the source's is copied. Shards hold the tensors in the source's order, scales of the cache
    last, and are streamed tensor by tensor. A quantized repository of ours at `output` is replaced, not atomically.

    Raises:
        InputError: the source is quantized or incomplete, or `output` holds anything else.
    """
    if any("quantization_config" in part for part in (source.config, source.config.get("text_config") or {})):
        raise InputError(f"{source.store.uri} is already quantized (config.json); start from the BF16 model")
    config = build_quantization_config(layout, choice, cache=bool(cache))
    copies = _copies(source, layout, choice, candidates, scale_tensors(cache))
    stale = claim(output, {"schema": MANIFEST_SCHEMA})
    shards = write_shards(output, copies, limit=max_shard_bytes)
    sizes = {copy.name: copy.nbytes for copy in copies}
    bpp, bits_all_parameters = bits(source, layout, sizes)
    small = {
        file: source.store.get(file)
        for file in source.other_files()
        if file not in REWRITTEN and (card is None or file != README)
    }
    if card is not None:
        weights = sum(shards.files.values())
        small[README] = card(Written(weight_bytes=weights, bpp=bpp, bits_all_parameters=bits_all_parameters))
    for file, data in small.items():
        output.put(file, data)

    index = as_json({"metadata": {"total_size": sum(sizes.values())}, "weight_map": shards.weight_map})
    config_json = _config_json(source, config)
    files, digests = sizes_and_digests(shards, small | {INDEX: index, CONFIG: config_json})
    names = {group: str(name) for group, name in choice.items()}
    body = {"schema": MANIFEST_SCHEMA, "complete": True, "run": dict(manifest), "choice": names, "files": files}
    body |= {"kv_cache": "fp8"} if cache else {}
    manifest_json = as_json(body | {"sha256": digests, "bpp": bpp, "bits_all_parameters": bits_all_parameters})
    output.put(MANIFEST, manifest_json)
    output.put(INDEX, index)
    output.put(CONFIG, config_json)
    files = {**files, MANIFEST: len(manifest_json)}
    output.delete(file for file in stale if file not in files)
    return WrittenRepository(
        files=files,
        sha256=shards.sha256,
        total_bytes=sum(files.values()),
        bpp=bpp,
        bits_all_parameters=bits_all_parameters,
    )


def _config_json(source: TensorSource, quantization: Mapping[str, Any] | None) -> bytes:
    """config.json: the source's file as it is where nothing has changed."""
    if quantization is not None:
        return as_json({**source.config, "quantization_config": quantization})
    given = source.store.get(CONFIG)
    # The source's own quantization is decoded.
    return given if parse_json(given) == source.config else as_json(source.config)


def bits(source: TensorSource, layout: Layout, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Bits per quantizable parameter and per parameter of the model, from the bytes of every written tensor."""
    counted = sum(sizes.get(tensor, 0) for tensor in _counted(layout))
    parameters = sum(math.prod(info.shape) for info in source.tensors.values())
    return 8 * counted / layout.parameters, 8 * sum(sizes.values()) / parameters


def _counted(layout: Layout) -> set[str]:
    """Possible names of weights of quantizable Linears: as shipped, and as in the source."""
    shipped = {f"{name}.{suffix}" for linear in layout.linears() for name in linear.names for suffix in _COUNTED}
    return shipped | {source for linear in layout.linears() for source in linear.sources}


def _copies(
    source: TensorSource, layout: Layout, choice: Choice, candidates: Candidates, scales: Mapping[str, Tensor]
) -> list[Output]:
    """All tensors of the output: the source's, with quantized weights replaced by their candidates' tensors; scales."""
    replaced: dict[str, list[Output]] = {}
    for block in layout.blocks:
        for group in block.groups:
            name = choice[group.name]
            if FORMATS[name].codec is None:
                continue
            file = candidates.file(block.index, name)
            for linear in group.linears:
                for place, infos in zip(_places(linear), file.of(name, linear).values(), strict=True):
                    replaced.setdefault(place, []).extend(Output.copy((candidates.store, info)) for info in infos)
    copies: list[Output] = []
    for tensor in source.tensors:
        if tensor in replaced:
            copies += replaced.pop(tensor)
        else:
            copies.append(Output.copy(source.piece(tensor)))
    copies += [Output.copy(piece) for piece in InMemory(scales).pieces]
    if replaced:
        raise InputError(f"{source.store.uri}: tensor {min(replaced)} is missing; the checkpoint is incomplete")
    seen: set[str] = set()
    for copy in copies:
        if copy.name in seen:
            raise InputError(f"{source.store.uri}: has a tensor {copy.name}, a name the quantized weight needs")
        seen.add(copy.name)
    return copies


def _places(linear: LinearSpec) -> tuple[str, ...]:
    """The source tensor that each module replaces: its own, or the packed one."""
    return linear.sources if len(linear.sources) == len(linear.names) else linear.sources * len(linear.names)
