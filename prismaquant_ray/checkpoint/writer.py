"""Writing a model repository: bytes copied from the source and from the stored candidates, no arithmetic.

Readers of a prefix that is being written never see a model: config.json is written last. `publish.published` adds
that nothing is seen that was not verified, and leaves an old local repository in place until the new one is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prismaquant_ray.checkpoint.candidates import Candidates
from prismaquant_ray.checkpoint.header import TensorInfo, build_header
from prismaquant_ray.checkpoint.quantization_config import Choice, build
from prismaquant_ray.checkpoint.ranges import read_pieces
from prismaquant_ray.checkpoint.reader import INDEX, Checkpoint
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS
from prismaquant_ray.layout import Layout
from prismaquant_ray.storage.store import ByteWriter, Store

CONFIG = "config.json"
MANIFEST = "prismaquant.json"
MANIFEST_SCHEMA = 1
#: files of the source that are written anew
REWRITTEN = (CONFIG, MANIFEST)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# What bits per parameter count; the scalars beside them are some bytes of a matrix of megabytes.
_COUNTED = ("weight", "weight_packed", "weight_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """What was written.

    `files` maps every file to its bytes, `sha256` every shard to its digest. `bpp` is bits of codes and group
    scales per quantizable parameter; `bits_all_parameters` is bits of all tensors per parameter of the model.
    """

    files: dict[str, int]
    sha256: dict[str, str]
    total_bytes: int
    bpp: float
    bits_all_parameters: float


@dataclass(frozen=True, slots=True)
class _Copy:
    """One tensor of the output: its bytes are `info`'s in `store`."""

    info: TensorInfo
    store: Store


def write_repository(
    source: Checkpoint,
    layout: Layout,
    choice: Choice,
    candidates: Candidates,
    output: Store,
    *,
    max_shard_bytes: int = 5_000_000_000,
    manifest: Mapping[str, Any],
) -> Repository:
    """Write the repository for a choice; `manifest` goes into prismaquant.json under `run`.

    Shards hold the tensors in the source's order and are streamed tensor by tensor. A prefix that holds a
    repository of ours is replaced, not atomically; one that holds anything else is refused with InputError.
    """
    if any("quantization_config" in part for part in (source.config, source.config.get("text_config") or {})):
        raise InputError(f"{source.store.uri} is already quantized (config.json); start from the BF16 model")
    config = build(layout, choice)
    copies = _copies(source, layout, choice, candidates)
    shards = _cut(copies, max_shard_bytes)
    stale = _claim(output)

    files: dict[str, int] = {}
    sha256: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[file], sha256[file] = _write_shard(output, file, shard)
        weight_map.update((copy.info.name, file) for copy in shard)
    for file in source.other_files():
        if file not in REWRITTEN:
            files[file] = _put(output, file, source.store.get(file))

    sizes = {copy.info.name: copy.info.nbytes for copy in copies}
    index = _json({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    config_json = source.store.get(CONFIG)
    if config is not None:
        config_json = _json({**source.config, "quantization_config": config})
    files |= {INDEX: len(index), CONFIG: len(config_json)}
    bpp, bits_all_parameters = bits(source, layout, sizes)
    body = _manifest(choice, manifest) | {"complete": True, "files": files, "sha256": sha256}
    body |= {"bpp": bpp, "bits_all_parameters": bits_all_parameters}
    files = {**files, MANIFEST: _put(output, MANIFEST, _json(body))}
    _put(output, INDEX, index)
    _put(output, CONFIG, config_json)
    output.delete(file for file in stale if file not in files)
    return Repository(
        files=files,
        sha256=sha256,
        total_bytes=sum(files.values()),
        bpp=bpp,
        bits_all_parameters=bits_all_parameters,
    )


def bits(source: Checkpoint, layout: Layout, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Bits per quantizable parameter and per parameter of the model, from the bytes of every written tensor."""
    counted = sum(sizes.get(f"{linear.name}.{suffix}", 0) for linear in layout.linears() for suffix in _COUNTED)
    parameters = sum(math.prod(info.shape) for info in source.tensors.values())
    return 8 * counted / layout.parameters, 8 * sum(sizes.values()) / parameters


def _copies(source: Checkpoint, layout: Layout, choice: Choice, candidates: Candidates) -> list[_Copy]:
    """Every tensor of the output: the source's, each quantized weight replaced by its candidate's tensors."""
    replaced: dict[str, list[_Copy]] = {}
    for block in layout.blocks:
        for group in block.groups:
            name = choice[group.name]
            if FORMATS[name].codec is None:
                continue
            file = candidates.file(block.index, name)
            for linear in group.linears:
                replaced[linear.weight] = [_Copy(info, candidates.store) for info in file.of(name, linear)]
    copies: list[_Copy] = []
    for info in source.tensors.values():
        copies.extend(replaced.pop(info.name, [_Copy(info, source.store)]))
    if replaced:
        raise InputError(f"{source.store.uri}: tensor {min(replaced)} is missing; the checkpoint is incomplete")
    seen: set[str] = set()
    for copy in copies:
        if copy.info.name in seen:
            raise InputError(f"{source.store.uri}: has a tensor {copy.info.name}, a name the quantized weight needs")
        seen.add(copy.info.name)
    return copies


def _cut(copies: Sequence[_Copy], limit: int) -> list[list[_Copy]]:
    """Consecutive runs of at most `limit` bytes; a larger tensor is alone."""
    shards: list[list[_Copy]] = [[]]
    filled = 0
    for copy in copies:
        if shards[-1] and filled + copy.info.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(copy)
        filled += copy.info.nbytes
    return shards


def _write_shard(output: Store, file: str, shard: Sequence[_Copy]) -> tuple[int, str]:
    """Bytes and digest of the shard."""
    header = build_header({copy.info.name: (copy.info.dtype, copy.info.shape, copy.info.nbytes) for copy in shard})

    def write(writer: ByteWriter) -> str:
        digest = hashlib.sha256(header)
        writer.write(header)
        for _, data in read_pieces((copy.store, copy.info) for copy in shard):
            digest.update(data)
            writer.write(data)
        return digest.hexdigest()

    return len(header) + sum(copy.info.nbytes for copy in shard), output.upload(file, write)


def _claim(output: Store) -> list[str]:
    """Mark a prefix as ours and as incomplete; what a former repository may leave behind."""
    keys = output.list()
    check_ours(output.uri, keys)
    listed = _listed(output, keys)
    stale = [key for key in keys if key in listed or _SHARD.fullmatch(key)]
    output.delete([CONFIG, INDEX])
    # The old names are kept until the new files are there: the next attempt must know them, too.
    _put(output, MANIFEST, _json({"schema": MANIFEST_SCHEMA, "complete": False, "files": dict.fromkeys(stale, 0)}))
    return stale


def check_ours(uri: str, keys: Sequence[str]) -> None:
    """InputError unless these keys are those of a repository of ours, or none."""
    if keys and MANIFEST not in keys:
        raise InputError(f"{uri} holds something else ({keys[0]}); choose another output or empty it")


def _listed(output: Store, keys: Sequence[str]) -> set[str]:
    """The files that the manifest in place names; none when it cannot be read, a stopped write may have cut it."""
    try:
        files = json.loads(output.get(MANIFEST))["files"] if MANIFEST in keys else {}
    except (ValueError, KeyError, TypeError):
        return set()
    return set(files) if isinstance(files, dict) else set()


def _manifest(choice: Choice, run: Mapping[str, Any]) -> dict[str, Any]:
    names = {group: str(name) for group, name in choice.items()}
    return {"schema": MANIFEST_SCHEMA, "complete": False, "run": dict(run), "choice": names}


def _put(output: Store, file: str, data: bytes) -> int:
    output.put(file, data)
    return len(data)


def _json(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
