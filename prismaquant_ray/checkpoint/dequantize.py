"""Decoding a compressed-tensors repository to BF16: the weights that vLLM computes, for what cannot read their codes.

Only the repository is read. What a module is says its config group, found by vLLM's rules, and its tensors must be
those of that format; what is wrong is refused before anything is written. Weights are decoded while shards are
written, a batch at a time.

Experts are packed again, (E, 2I, H) with gate above up and (E, H, I), in architectures whose checkpoints have them
packed, and where another layer of the repository still has: so the result has the names and shapes of the model that
was quantized, whichever layers the plan took, and what reads that model reads it. Elsewhere every expert keeps tensors
of its own, as in those checkpoints.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prismaquant_ray.checkpoint.candidates import INPUT_SCALE
from prismaquant_ray.checkpoint.header import TensorInfo
from prismaquant_ray.checkpoint.publish import check_output
from prismaquant_ray.checkpoint.quantized_modules import Module, modules_of, without_scheme
from prismaquant_ray.checkpoint.ranges import Piece
from prismaquant_ray.checkpoint.reader import INDEX, Checkpoint
from prismaquant_ray.checkpoint.shards import (
    CONFIG,
    DEQUANTIZED,
    MANIFEST,
    Output,
    as_json,
    claim,
    write_shards,
)
from prismaquant_ray.checkpoint.verify import WEIGHT_SCALE
from prismaquant_ray.checkpoint.writer import REWRITTEN
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.models.families import FAMILIES, qwen_hybrid
from prismaquant_ray.storage.connection import absolute, local_path
from prismaquant_ray.storage.store import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCHEMA = 1
# Qwen3.5's checkpoints have experts packed; those of its architectures that are dense have none.
_PACKED = frozenset((*qwen_hybrid.VISION_LANGUAGE.architectures, *qwen_hybrid.TEXT.architectures))
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dequantized:
    """What was written; `notes` are one line each about weights on which runtimes do not agree."""

    files: dict[str, int]
    sha256: dict[str, str]
    notes: tuple[str, ...]


class QuantizedRepository:
    """A repository and what it decodes to. Opening reads headers and config.json only.

    InputError for one that is not quantized or cannot be decoded; it names the first module and its scheme.
    """

    def __init__(self, store: Store) -> None:
        self.source = Checkpoint(store)
        self.modules = modules_of(self.source)
        self._decoder = _Decoder(self.source, self.modules)
        self.outputs = self._outputs()

    @property
    def formats(self) -> dict[FormatName, int]:
        """Quantized modules by format."""
        found = Counter(module.format for module in self.modules)
        return {name: found[name] for name in FORMATS if found[name]}

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(info.nbytes for info in self.source.stored.values())

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors as they will be."""
        return sum(output.nbytes for output in self.outputs)

    def write(self, output: Store, *, max_shard_bytes: int = 5_000_000_000) -> Dequantized:
        """Write the BF16 repository where nothing or an earlier result is (`check_place`), config.json last.

        InputError, with the repository incomplete, for weights that only decoding shows to be wrong.
        """
        head = {"schema": SCHEMA, "kind": DEQUANTIZED}
        stale = claim(output, head)
        shards = write_shards(output, self.outputs, limit=max_shard_bytes)
        files = dict(shards.files)
        for file in self.source.other_files():
            if file not in REWRITTEN:
                data = self.source.store.get(file)
                output.put(file, data)
                files[file] = len(data)
        index = as_json({"metadata": {"total_size": self.bytes_after}, "weight_map": shards.weight_map})
        config = as_json(without_scheme(self.source.source_config))
        files |= {INDEX: len(index), CONFIG: len(config)}
        formats = {str(name): count for name, count in self.formats.items()}
        body = head | {"complete": True, "formats": formats, "sha256": shards.sha256, "files": files}
        output.put(MANIFEST, as_json(body))
        output.put(INDEX, index)
        output.put(CONFIG, config)
        output.delete(file for file in stale if file not in files)
        return Dequantized(files=files, sha256=shards.sha256, notes=tuple(_notes(self._decoder.divisors)))

    def _outputs(self) -> tuple[Output, ...]:
        """Every tensor, each weight at the place of the first of those that it is decoded from."""
        owner = {info.name: module for module in self.modules for info in module.tensors.values()}
        found: dict[str, Output] = {}
        for name in self.source.tensors:
            piece = self._decoder.piece(owner[name]) if name in owner else self.source.piece(name)
            found[piece[1].name] = Output.copy(piece)
        decoded = {f"{module.name}.weight" for module in self.modules}
        return tuple(_packed_again(found, decoded, self.source.config).values())


# Weights ------------------------------------------------------------------------------------------------------------


class _Decoder:
    """The decoded bytes of all modules, as one file: what is asked for together is read together."""

    def __init__(self, source: Checkpoint, modules: Iterable[Module]) -> None:
        self._source = source
        self._infos: dict[str, TensorInfo] = {}
        self._at: dict[int, Module] = {}
        start = 0
        for module in modules:
            stop = start + 2 * module.rows * module.columns
            shape = (module.rows, module.columns)
            self._infos[module.name] = TensorInfo(
                name=f"{module.name}.weight", file="decoded", dtype="BF16", shape=shape, start=start, stop=stop
            )
            self._at[start] = module
            start = stop
        #: global scale of every NVFP4 module that was decoded
        self.divisors: dict[str, float] = {}

    @property
    def uri(self) -> str:
        """Where the codes are."""
        return self._source.store.uri

    def piece(self, module: Module) -> Piece:
        """A decoded weight."""
        return self, self._infos[module.name]

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:  # noqa: ARG002
        """Bytes of whole weights. InputError for one that is not finite or not of the shape it says."""
        modules = [self._at[start] for start, _ in ranges]
        wanted = [info.name for module in modules for key, info in module.tensors.items() if key != INPUT_SCALE]
        tensors = self._source.read(wanted)
        found: list[Buffer] = []
        for module in modules:
            own = {key: tensors.pop(info.name) for key, info in module.tensors.items() if key != INPUT_SCALE}
            found.append(self._decoded(module, own).view(-1).view(torch.uint8).numpy().data)
        return found

    def _decoded(self, module: Module, tensors: Mapping[str, Tensor]) -> Tensor:
        shape, scale = tensors.get("weight_shape"), tensors["weight_scale"]
        if shape is not None and shape.tolist() != [module.rows, module.columns]:
            raise InputError(
                f"{self.uri}: {module.name}.weight_shape is {shape.tolist()}, but the codes are "
                f"{module.rows} × {module.columns}"
            )
        if WEIGHT_SCALE in tensors:
            self.divisors[module.name] = tensors[WEIGHT_SCALE].item()
        decoded = module.codec.decode(tensors)
        sound = bool(decoded.isfinite().all())
        if scale.dtype == torch.uint8 and bool((scale == 0).any()):
            # 2⁻¹²⁷ is a subnormal that runtimes read differently, which is no matter below zeros.
            visible = module.codec.decode({**tensors, "weight_scale": torch.where(scale == 0, 127, scale)})
            sound = sound and torch.equal(visible, decoded)
        if not sound:
            raise InputError(
                f"{self.uri}: {module.name} ({module.format}) decodes to weights that are NaN, infinite or below "
                "2⁻¹²⁶; the repository is damaged, fetch or make it again"
            )
        return decoded


def _packed_again(outputs: Mapping[str, Output], decoded: set[str], config: Mapping[str, Any]) -> dict[str, Output]:
    """The same with experts packed where they were: see the module."""
    stacks: dict[str, dict[tuple[int, str], str]] = {}
    for name in outputs:
        if found := _EXPERT.fullmatch(name):
            stacks.setdefault(found[1], {})[int(found[2]), found[3]] = name
    replaced: dict[str, list[Output]] = {}
    for stack, names in stacks.items():
        packed = _stacked(stack, {key: outputs[name] for key, name in names.items()})
        if packed and decoded.intersection(names.values()) and _was_packed(packed, outputs, config):
            replaced |= dict.fromkeys(names.values(), packed)
    result: dict[str, Output] = {}
    for name, output in outputs.items():
        result |= {tensor.name: tensor for tensor in replaced.get(name, (output,))}
    return result


def _stacked(stack: str, members: Mapping[tuple[int, str], Output]) -> list[Output]:
    """The packed tensors of one layer's experts; none when an expert is missing or is not like the others."""
    experts = len({number for number, _ in members})
    found = []
    for packed, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        keys = [(expert, leaf) for expert in range(experts) for leaf in leaves]
        parts = [members[key] for key in keys if key in members]
        kinds = {(part.dtype, part.shape) for part in parts}
        if len(parts) < len(keys) or len(kinds) > 1 or parts[0].dtype != "BF16":
            return []
        rows, columns = parts[0].shape
        pieces = tuple(piece for part in parts for piece in part.pieces)
        found.append(Output(f"{stack}.{packed}", "BF16", (experts, len(leaves) * rows, columns), pieces))
    return found


def _was_packed(packed: Sequence[Output], outputs: Mapping[str, Output], config: Mapping[str, Any]) -> bool:
    """Whether the source has such experts packed: its architecture does, or other layers are, in the same shapes."""
    if any(tensor.name in outputs for tensor in packed):
        return False
    if not _PACKED.isdisjoint(config.get("architectures") or ()):
        return True
    witnesses = {(name.rpartition(".")[2], output.shape) for name, output in outputs.items() if ".experts." in name}
    return all((tensor.name.rpartition(".")[2], tensor.shape) in witnesses for tensor in packed)


def _notes(divisors: Mapping[str, float]) -> Iterator[str]:
    rough = [name for name, value in divisors.items() if torch.tensor(value).bfloat16().item() != value]
    if rough:
        yield (
            f"{_some(rough)}: {WEIGHT_SCALE} is not a BF16 value; vLLM multiplies by its reciprocal, which may round a "
            "weight to the neighbouring BF16 value"
        )
    apart = [names[0] for names in _fused(divisors) if len({divisors[name] for name in names}) > 1]
    if apart:
        yield f"{_some(apart)}: {WEIGHT_SCALE} is not that of what vLLM fuses with it; vLLM applies one of them to all"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _fused(names: Iterable[str]) -> Iterator[list[str]]:
    """Modules that runtimes hold as one matrix, by the rules of any family."""
    rules = {rule.members for family in FAMILIES for rule in family.fused}
    rules |= {(family.experts.gate, family.experts.up) for family in FAMILIES}
    leaves: dict[str, set[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        leaves.setdefault(parent, set()).add(leaf)
    for parent, own in leaves.items():
        for members in sorted(rules):
            if own.issuperset(members):
                yield [f"{parent}.{leaf}" for leaf in members]


# Output -------------------------------------------------------------------------------------------------------------


def check_place(repository: str, output: str) -> None:
    """InputError unless the result may be put at `output`: nothing is there, or an earlier one."""
    places = _segments(repository), _segments(output)
    if all(left == right for left, right in zip(*places, strict=False)):
        raise InputError(f"{output} and {repository} are one place, or one lies in the other; choose another output")
    check_output(output, dequantized=True)


def _segments(place: str) -> Sequence[str]:
    path = local_path(place)
    return absolute(place).split("/") if path is None else Path(path).resolve().parts
