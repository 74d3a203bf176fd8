"""Decoded tensors of a quantized repository, with the names, shapes and bytes of the original model.

Experts are packed again, (E, 2I, H) with gate above up and (E, H, I), if checkpoints of the architecture have them
packed, transformers reads them in no other form, or another layer of the repository has them so; some architectures
have each matrix transposed. So the result does not depend on which layers were quantized, and tools that read the
source can read it. Otherwise each expert keeps its own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prismaquant_ray.compressed.quantized_modules import QuantizedModule, unquantized_config
from prismaquant_ray.errors import InputError
from prismaquant_ray.families import FAMILIES, qwen_hybrid
from prismaquant_ray.formats.tensor_names import OF_INPUTS, WEIGHT_GLOBAL_SCALE
from prismaquant_ray.model.expert_stacks import expert_stacks
from prismaquant_ray.repository.shards import Output
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.header import DTYPES, TensorInfo
from prismaquant_ray.source.protocol import Piece
from prismaquant_ray.source.ranges import read_pieces

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Checkpoints of Qwen3.5 have packed experts; its dense architectures have no experts.
_PACKED = frozenset((*qwen_hybrid.VISION_LANGUAGE.architectures, *qwen_hybrid.TEXT.architectures))
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_FLOATS = ("BF16", "F16")


def decoded_outputs(
    source: Checkpoint, modules: Iterable[QuantizedModule], decoder: ModuleDecoder, left_out: Collection[str] = ()
) -> tuple[Output, ...]:
    """Every tensor; a decoded weight takes the place of the first tensor it is decoded from."""
    modules = tuple(modules)
    owner = {info.name: module for module in modules for info in module.tensors.values()}
    found: dict[str, Output] = {}
    for name in source.tensors:
        if name not in left_out:
            piece = decoder.piece(owner[name]) if name in owner else source.piece(name)
            found[piece[1].name] = Output.copy(piece)
    decoded = {f"{module.name}.weight" for module in modules}
    return tuple(_packed_again(found, decoded, source.config).values())


# Weights ------------------------------------------------------------------------------------------------------------


class ModuleDecoder:
    """The decoded bytes of all modules, as one virtual file; a request for several modules reads them together."""

    divisible = False

    def __init__(self, source: Checkpoint, modules: Iterable[QuantizedModule]) -> None:
        self._source = source
        self._infos: dict[str, TensorInfo] = {}
        self._at: dict[int, QuantizedModule] = {}
        start = 0
        for module in modules:
            shape = (module.rows, module.columns)
            stop = start + DTYPES[module.dtype].itemsize * module.rows * module.columns
            self._infos[module.name] = TensorInfo(
                name=f"{module.name}.weight", file="decoded", dtype=module.dtype, shape=shape, start=start, stop=stop
            )
            self._at[start] = module
            start = stop
        #: Global scale of every decoded NVFP4 module.
        self.divisors: dict[str, float] = {}

    @property
    def uri(self) -> str:
        """URI of the repository."""
        return self._source.store.uri

    def piece(self, module: QuantizedModule) -> Piece:
        """A decoded weight."""
        return self, self._infos[module.name]

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:  # noqa: ARG002
        """Bytes of whole decoded weights.

        Raises:
            InputError: a weight is not finite, or not of the shape in `weight_shape`.
        """
        modules = [self._at[start] for start, _ in ranges]
        wanted = [info.name for module in modules for key, info in module.tensors.items() if key not in OF_INPUTS]
        tensors = self._source.read(wanted)
        found: list[Buffer] = []
        for module in modules:
            own = {key: tensors.pop(info.name) for key, info in module.tensors.items() if key not in OF_INPUTS}
            found.append(self._decoded(module, own).view(-1).view(torch.uint8).numpy().data)
        return found

    def _decoded(self, module: QuantizedModule, tensors: Mapping[str, Tensor]) -> Tensor:
        shape, scale = tensors.get("weight_shape"), tensors["weight_scale"]
        if shape is not None and shape.tolist() != [module.rows, module.columns]:
            raise InputError(
                f"{self.uri}: {module.name}.weight_shape is {shape.tolist()}, but the codes are "
                f"{module.rows} × {module.columns}"
            )
        if WEIGHT_GLOBAL_SCALE in tensors:
            self.divisors[module.name] = tensors[WEIGHT_GLOBAL_SCALE].item()
        decoded = module.decode(tensors)
        sound = bool(decoded.isfinite().all())
        if scale.dtype == torch.uint8 and bool((scale == 0).any()):
            # Runtimes treat the subnormal scale 2⁻¹²⁷ differently; it only matters for nonzero codes.
            visible = module.decode({**tensors, "weight_scale": torch.where(scale == 0, 127, scale)})
            sound = sound and torch.equal(visible, decoded)
        if not sound:
            raise InputError(
                f"{self.uri}: {module.name} ({module.kind}) decodes to weights that are NaN, infinite or below "
                "2⁻¹²⁶; the repository is damaged, fetch or make it again"
            )
        return decoded


def divisor_caveats(divisors: Mapping[str, float]) -> Iterator[str]:
    """One line for each kind of NVFP4 weights whose global scale differs between runtimes."""
    rough = [name for name, value in divisors.items() if torch.tensor(value).bfloat16().item() != value]
    if rough:
        yield (
            f"{_some(rough)}: {WEIGHT_GLOBAL_SCALE} is not a BF16 value; vLLM multiplies by its reciprocal, which may "
            "round a weight to the neighbouring BF16 value"
        )
    if apart := fused_apart(divisors):
        yield f"{apart}: {WEIGHT_GLOBAL_SCALE} is not that of what vLLM fuses with it; vLLM applies one of them to all"


def fused_apart(values: Mapping[str, float]) -> str | None:
    """Modules whose value differs from that of a module fused with them, the first by name; None without any."""
    apart = [names[0] for names in _fused(values) if len({values[name] for name in names}) > 1]
    return _some(apart) if apart else None


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _fused(names: Iterable[str]) -> Iterator[list[str]]:
    """Names of modules that runtimes fuse into one matrix, by the rules of all families."""
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


# Experts ------------------------------------------------------------------------------------------------------------


def _packed_again(outputs: Mapping[str, Output], decoded: set[str], config: Mapping[str, Any]) -> dict[str, Output]:
    """The outputs with experts packed; see the module docstring."""
    stacks: dict[str, dict[tuple[int, str], str]] = {}
    for name in outputs:
        if found := _EXPERT.fullmatch(name):
            stacks.setdefault(found[1], {})[int(found[2]), found[3]] = name
    quantized = {stack: names for stack, names in stacks.items() if decoded.intersection(names.values())}
    form = expert_stacks(unquantized_config(config)) if quantized else None
    replaced: dict[str, list[Output]] = {}
    for stack, names in quantized.items():
        members = {key: outputs[name] for key, name in names.items()}
        packed = _stacked(stack, members, transposed=form is not None and form.transposed)
        known = not packed or any(tensor.name in outputs for tensor in packed)
        if not known and (form is not None or _was_packed(packed, outputs, config)):
            replaced |= dict.fromkeys(names.values(), packed)
    result: dict[str, Output] = {}
    for name, output in outputs.items():
        result |= {tensor.name: tensor for tensor in replaced.get(name, (output,))}
    return result


def _stacked(stack: str, members: Mapping[tuple[int, str], Output], *, transposed: bool) -> list[Output]:
    """The packed tensors of one layer's experts; empty if an expert is missing or differs in dtype or shape."""
    experts = len({number for number, _ in members})
    found = []
    for packed, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        keys = [(expert, leaf) for expert in range(experts) for leaf in leaves]
        parts = [members[key] for key in keys if key in members]
        kinds = {(part.dtype, part.shape) for part in parts}
        if len(parts) < len(keys) or len(kinds) > 1 or parts[0].dtype not in _FLOATS:
            return []
        rows, columns = len(leaves) * parts[0].shape[0], parts[0].shape[1]
        pieces = tuple(piece for part in parts for piece in part.pieces)
        shape = (experts, rows, columns)
        if transposed:
            shape = (experts, columns, rows)
            own = len(pieces) // experts
            turned = (_Transposed(pieces[at : at + own], shape[1:]) for at in range(0, len(pieces), own))
            pieces = tuple((each, each.info) for each in turned)
        found.append(Output(f"{stack}.{packed}", parts[0].dtype, shape, pieces))
    return found


class _Transposed:
    """One matrix (columns, rows) of pieces that have its rows, as a file with nothing else."""

    divisible = False

    def __init__(self, pieces: Sequence[Piece], shape: tuple[int, ...]) -> None:
        self._pieces = pieces
        _, first = pieces[0]
        size = sum(info.nbytes for _, info in pieces)
        #: The matrix.
        self.info = TensorInfo(name=first.name, file="transposed", dtype=first.dtype, shape=shape, start=0, stop=size)

    @property
    def uri(self) -> str:
        """URI of the repository."""
        return self._pieces[0][0].uri

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:  # noqa: ARG002
        """The bytes of the matrix; `ranges` are the whole of it."""
        columns = self.info.shape[0]
        rows = [
            torch.frombuffer(bytearray(data), dtype=DTYPES[self.info.dtype]).view(-1, columns)
            for _, data in read_pieces(self._pieces)
        ]
        return [torch.cat(rows).T.contiguous().view(-1).view(torch.uint8).numpy().data]


def _was_packed(packed: Sequence[Output], outputs: Mapping[str, Output], config: Mapping[str, Any]) -> bool:
    """Whether the source has its experts packed: by its architecture, or in other layers of the same shapes."""
    if not _PACKED.isdisjoint(config.get("architectures") or ()):
        return True
    witnesses = {(name.rpartition(".")[2], output.shape) for name, output in outputs.items() if ".experts." in name}
    return all((tensor.name.rpartition(".")[2], tensor.shape) in witnesses for tensor in packed)
