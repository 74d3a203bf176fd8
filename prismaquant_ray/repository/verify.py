"""Verifying a repository: everything is read again from its files, and every problem is collected.

vLLM does not detect a missing scale, a wrong global scale in a fused module or a wrong dtype: it serves garbage. So
names, dtypes, routing and bytes are checked here against the source and the stored candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prismaquant_ray.cache_rounding import CacheScale, scale_tensors
from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fp8_block import CODEC as FP8_BLOCK
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE, WEIGHT_GLOBAL_SCALE
from prismaquant_ray.forward.candidates import CandidateFile, Candidates, shipped, stored_digest
from prismaquant_ray.forward.passed_blocks import passed_scales, stored_scales
from prismaquant_ray.layout import Block, FusedGroup, Layout, LinearSpec, Matrix
from prismaquant_ray.parsing import MalformedError, as_object
from prismaquant_ray.repository import routing
from prismaquant_ray.repository.manifest import MANIFEST, is_shard
from prismaquant_ray.repository.quantization_config import Choice, check_choice, linears_by_format
from prismaquant_ray.repository.tensor_checks import (
    by_module,
    same_bytes,
    scale_problems,
    shared_scale_problems,
    weight_problems,
)
from prismaquant_ray.repository.writer import NO_CACHE, REWRITTEN, bits
from prismaquant_ray.source.checkpoint import read_header
from prismaquant_ray.source.files import CONFIG, INDEX
from prismaquant_ray.source.folded import FoldedSource
from prismaquant_ray.source.header import DTYPE_NAMES, TensorInfo, as_tensor
from prismaquant_ray.source.protocol import Piece, TensorSource
from prismaquant_ray.source.ranges import parts, read_pieces, threads
from prismaquant_ray.storage.prefix import Prefix, get_json

if TYPE_CHECKING:
    pass

# Files that users may edit after writing.
_MUTABLE = ("README.md",)
# Bytes per batch that a thread compares; a larger module is a batch of its own.
_COMPARED = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Result of a verification. Each problem is one line; `linears` counts Linears by format."""

    problems: tuple[str, ...]
    tensors: int
    linears: dict[FormatName, int]
    total_bytes: int
    bpp: float
    bits_all_parameters: float

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def verify_repository(
    repository: Prefix,
    source: TensorSource,
    layout: Layout,
    choice: Choice,
    candidates: Candidates | None,
    *,
    cache: Mapping[str, CacheScale] = NO_CACHE,
) -> VerifyReport:
    """Re-read a repository with threads; each holds a batch of modules or tensors in memory at a time.

    Without candidates, weights are not compared with the stored ones; everything else is checked. `cache` has the
    scales of an FP8 KV cache, by attention.

    Raises:
        InputError: the choice does not fit the layout.
    """
    check_choice(layout, choice)
    check = _Check(repository, source, layout, choice, scale_tensors(cache))
    with ThreadPoolExecutor(threads(), thread_name_prefix="verify") as pool:
        # Digests first: one task per shard, the longest tasks.
        digests = {file: pool.submit(stored_digest, repository, file, check.sizes[file]) for file in check.shards}
        weights = [pool.submit(check.weights, block, candidates) for block in layout.blocks]
        passed = [pool.submit(check.passthrough, names) for names in check.kept()]
        problems = [*check.index(), *check.names(), *check.config(), *check.cache()]
        problems += [problem for found in (*weights, *passed) for problem in found.result()]
        problems += check.files()
        problems += check.manifest({file: digest.result() for file, digest in digests.items()})
    bpp, bits_all_parameters = check.bits()
    return VerifyReport(
        # Several checks report the same unreadable file.
        problems=tuple(dict.fromkeys(problems)),
        tensors=len(check.tensors),
        linears={name: len(linears) for name, linears in linears_by_format(layout, choice).items() if linears},
        total_bytes=sum(check.sizes.values()),
        bpp=bpp,
        bits_all_parameters=bits_all_parameters,
    )


class _Check:
    """One repository under verification; each method yields the problems it finds."""

    def __init__(
        self, repository: Prefix, source: TensorSource, layout: Layout, choice: Choice, scales: Mapping[str, Tensor]
    ) -> None:
        self.scales = scales
        self.repository = repository
        self.source = source
        self.layout = layout
        self.choice = choice
        self.folded = frozenset(source.folded) if isinstance(source, FoldedSource) else frozenset()
        self.sizes = {key: repository.size(key) or 0 for key in repository.list()}
        self.shards = sorted(key for key in self.sizes if key.endswith(".safetensors"))
        self.tensors: dict[str, TensorInfo] = {}
        self.unreadable: list[str] = []
        for file in self.shards:
            try:
                infos = read_header(repository, file)
            except InputError as error:
                self.unreadable.append(str(error))
                continue
            for info in infos:
                if info.name in self.tensors:
                    self.unreadable.append(f"{info.name} is in both {self.tensors[info.name].file} and {file}")
                self.tensors[info.name] = info
        quantized = [
            (name, linear)
            for name, linears in linears_by_format(layout, choice).items()
            for linear in linears
            if FORMATS[name].codec is not None
        ]
        self.replaced = {tensor for _, linear in quantized for tensor in linear.sources}
        self.expected: dict[str, tuple[str, tuple[int, ...]]] = {
            name: (info.dtype, info.shape) for name, info in source.tensors.items() if name not in self.replaced
        }
        for name, linear in quantized:
            entries = shipped(name, linear)
            self.expected |= {f"{module}.{suffix}": e for module in linear.names for suffix, e in entries.items()}

        self.expected |= {name: (DTYPE_NAMES[scale.dtype], tuple(scale.shape)) for name, scale in scales.items()}

    def bits(self) -> tuple[float, float]:
        return bits(self.source, self.layout, {name: info.nbytes for name, info in self.tensors.items()})

    def _json(self, file: str) -> tuple[dict[str, Any], list[str]]:
        try:
            return as_object(get_json(self.repository, file)), []
        except KeyError:
            return {}, [f"{file} is missing"]
        except MalformedError as error:
            return {}, [f"{file} {error}"]

    # Names and files ------------------------------------------------------------------------------------------

    def index(self) -> Iterator[str]:
        """Shards are readable, and the index matches their tensors."""
        yield from self.unreadable
        body, problems = self._json(INDEX)
        yield from problems
        if problems:
            return
        weight_map = body.get("weight_map")
        if not isinstance(weight_map, dict):
            yield f"{INDEX} has no weight_map"
            return
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].file != file:
                yield f"{INDEX} places {name} in {file}, which does not hold it"
        for name in sorted(self.tensors.keys() - weight_map.keys()):
            yield f"{name} is in {self.tensors[name].file} but not in {INDEX}"
        total = sum(info.nbytes for info in self.tensors.values())
        stated = _mapping(body, "metadata").get("total_size")
        if stated != total:
            yield f"{INDEX} states a total_size of {stated}; the tensors have {total} bytes"

    def names(self) -> Iterator[str]:
        """Every expected tensor with its dtype and shape, and nothing else."""
        for name, (dtype, shape) in self.expected.items():
            info = self.tensors.get(name)
            if info is None:
                yield f"tensor {name} is missing"
            elif (info.dtype, info.shape) != (dtype, shape):
                yield f"{name} is {info.dtype} {info.shape}; {dtype} {shape} expected"
        for name in sorted(self.tensors.keys() - self.expected.keys()):
            yield f"tensor {name} does not belong here; vLLM refuses tensors it does not know"

    def files(self) -> Iterator[str]:
        """All other files of the source are present and unchanged."""
        for file in self.source.other_files():
            if file in REWRITTEN:
                continue
            if file not in self.sizes:
                yield f"{file} of the source is missing"
            elif file not in _MUTABLE and self.repository.get(file) != self.source.store.get(file):
                yield f"{file} is not the source's"
        body, problems = self._json(CONFIG)
        yield from problems
        if not problems and {key: body[key] for key in body if key != "quantization_config"} != self.source.config:
            yield f"{CONFIG} differs from the source's in more than quantization_config"

    def manifest(self, found: Mapping[str, str]) -> Iterator[str]:
        """The manifest matches the files; `found` has the digest of every shard."""
        body, problems = self._json(MANIFEST)
        yield from problems
        if problems:
            return
        if body.get("complete") is not True:
            yield f"{MANIFEST} says that writing did not end"
        if body.get("kv_cache") != ("fp8" if self.scales else None):
            yield f"{MANIFEST} has another type of KV cache"
        if body.get("choice") != {group: str(name) for group, name in self.choice.items()}:
            yield f"{MANIFEST} has another choice of formats"
        for file, size in _mapping(body, "files").items():
            if file not in _MUTABLE and self.sizes.get(file) != size:
                yield f"{file} has {self.sizes.get(file)} bytes; {MANIFEST} states {size}"
        digests = _mapping(body, "sha256")
        # What else is in the files is compared with the source, or rebuilt; here only weights have digests.
        for file in sorted({info.file for info in self.tensors.values()} | {*filter(is_shard, digests)}):
            if file not in found or found[file] != digests.get(file):
                yield f"{file} does not have the digest that {MANIFEST} states"
        for key, value in zip(("bpp", "bits_all_parameters"), self.bits(), strict=True):
            if body.get(key) != value:
                yield f"{MANIFEST} states {key} {body.get(key)}; the shards have {value}"

    # Configuration and routing --------------------------------------------------------------------------------

    def config(self) -> Iterator[str]:
        """Both runtimes read the configuration and give every module its scheme."""
        body, problems = self._json(CONFIG)
        config = body.get("quantization_config")
        if problems:
            return
        if config is None:
            if self.scales or any(FORMATS[name].codec for name in self.choice.values()):
                yield f"{CONFIG} has no quantization_config"
            return
        found = list(routing.config_problems(config, cache=bool(self.scales)))
        yield from found
        if not found:
            modules = dict.fromkeys(name.rpartition(".")[0] for name in self.source.tensors)
            yield from routing.route_problems(config, self.layout, self.choice, modules)

    def cache(self) -> Iterator[str]:
        """The scales of the KV cache are those that were measured."""
        there = [name for name in self.scales if not self._differs(name)]
        for info, data in read_pieces((self.repository, self.tensors[name]) for name in there):
            found, scale = as_tensor(data, info.dtype, info.shape), self.scales[info.name]
            if not torch.equal(found, scale):
                yield f"{info.name} is {found.item()}, {scale.item()} was measured"

    # Contents -------------------------------------------------------------------------------------------------

    def weights(self, block: Block, candidates: Candidates | None) -> list[str]:
        """Scales are valid, fused modules share theirs, and weights are the stored candidates."""
        problems: list[str] = []
        files: dict[FormatName, CandidateFile] = {}
        if candidates is not None:
            for name in dict.fromkeys(self.choice[group.name] for group in block.groups):
                try:
                    if FORMATS[name].codec is not None:
                        files[name] = candidates.file(block.index, name)
                        files[name].check()
                except StoreError as error:
                    problems.append(str(error))
        for group in block.groups:
            problems += self._group(group, files.get(self.choice[group.name]))
        return problems

    def _group(self, group: FusedGroup, file: CandidateFile | None) -> Iterator[str]:
        name = self.choice[group.name]
        codec = FORMATS[name].codec
        if codec is None:
            return
        held: dict[str, list[TensorInfo]] = {}
        if file is not None:
            try:
                held = {module: infos for linear in group.linears for module, infos in file.of(name, linear).items()}
            except StoreError as error:
                yield str(error)
        shared: dict[str, Tensor] = {}
        for batch in self._batches(group):
            ours = by_module((self.repository, self.tensors[tensor]) for _, _, tensors in batch for tensor in tensors)
            theirs = by_module(
                (file.store, info) for module, _, _ in batch for info in held.get(module, ()) if file is not None
            )
            for module, linear, _ in batch:
                found = {key: as_tensor(data, info.dtype, info.shape) for key, (info, data) in ours[module].items()}
                shared |= {
                    f"{module}.{suffix}": found[suffix]
                    for suffix in found.keys() & {WEIGHT_GLOBAL_SCALE, INPUT_GLOBAL_SCALE}
                }
                yield from scale_problems(linear, module, found)
                yield from weight_problems(codec, linear, module, found, ours[module], theirs.get(module, {}))
        for matrix in group.matrices:
            yield from shared_scale_problems(matrix, shared)
            if codec is FP8_BLOCK and passed_scales(self.source, matrix) is not None:
                yield from self._passed(matrix)

    def _passed(self, matrix: Matrix) -> Iterator[str]:
        """Weights that pass through have the codes and the scales of the source's files."""
        for linear in matrix.linears:
            scales = stored_scales(self.source, linear.sources)
            for module, name in zip(linear.names, linear.sources, strict=True):
                codes, scale = f"{module}.weight", f"{module}.weight_scale"
                if self._differs(codes) or self._differs(scale):
                    continue
                ours = ((self.repository, self.tensors[tensor]) for tensor in (codes, scale))
                (_, found), (info, held) = read_pieces(ours)
                ((_, theirs),) = read_pieces([(self.source.store, self.source.blocks[name].weight)])
                same_scale = torch.equal(as_tensor(held, info.dtype, info.shape), scales[name])
                if not same_bytes(found, theirs) or not same_scale:
                    yield f"{module} does not have the codes and scales of {name} in the source's files"

    def _batches(self, group: FusedGroup) -> Iterator[list[tuple[str, LinearSpec, list[str]]]]:
        """Batches of modules with their tensors, without modules where a tensor is missing or has another shape."""
        batch: list[tuple[str, LinearSpec, list[str]]] = []
        filled = 0
        for linear in group.linears:
            for module in linear.names:
                tensors = [f"{module}.{suffix}" for suffix in shipped(self.choice[group.name], linear)]
                if any(self._differs(tensor) for tensor in tensors):
                    continue
                size = sum(self.tensors[tensor].nbytes for tensor in tensors)
                if batch and filled + size > _COMPARED:
                    yield batch
                    batch, filled = [], 0
                batch.append((module, linear, tensors))
                filled += size
        if batch:
            yield batch

    def _differs(self, name: str) -> bool:
        info = self.tensors.get(name)
        return info is None or (info.dtype, info.shape) != self.expected[name]

    def kept(self) -> Iterator[list[str]]:
        """Names of unquantized tensors, in batches."""
        run: list[str] = []
        filled = 0
        for name in self.source.tensors:
            if name in self.replaced or self._differs(name):
                continue
            run.append(name)
            filled += self.tensors[name].nbytes
            if filled > _COMPARED:
                yield run
                run, filled = [], 0
        if run:
            yield run

    def passthrough(self, names: Sequence[str]) -> list[str]:
        """Unquantized tensors equal the source's, byte for byte."""
        pairs: list[tuple[Piece, Piece]] = []
        for name in names:
            ours, theirs = (self.repository, self.tensors[name]), self.source.piece(name)
            # A tensor that the source stores in another form is decoded whole.
            cut = theirs[0].divisible
            pairs += zip(parts(ours), parts(theirs), strict=True) if cut else [(ours, theirs)]
        left, right = read_pieces(ours for ours, _ in pairs), read_pieces(theirs for _, theirs in pairs)
        changed = (
            info.name for (info, data), (_, other) in zip(left, right, strict=True) if not same_bytes(data, other)
        )
        return [
            f"{name} is not the source's{' times its factors' if name in self.folded else ''}, byte for byte"
            for name in dict.fromkeys(changed)
        ]


def _mapping(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = body.get(key)
    return value if isinstance(value, dict) else {}
