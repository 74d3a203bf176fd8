"""The parts of a model as names and shapes: blocks, Linears, and how Linears belong together.

A layout is built from the configuration and the safetensors headers only (`model.layout_builder`). It is the one
place where module names are parsed; everything after works with these objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate, pairwise

from prismaquant_ray.spelling import EXPERT, Spelling


class BlockKind(StrEnum):
    """The kind of a block, in the order in which blocks run."""

    VISION = "vision"
    MERGER = "merger"
    DECODER = "decoder"
    DRAFT = "draft"
    HEAD = "head"


#: Blocks behind the last decoder layer with their own loss; nothing reads their output.
HEADS = (BlockKind.DRAFT, BlockKind.HEAD)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """One Linear that may be quantized, or the same Linear of every expert of a layer.

    `name` is its module path in the repository, with `{}` for the expert's number; `experts` how many there are, None
    for one Linear by itself. `sources` are its checkpoint tensors: one, one per expert, or a packed tensor.
    """

    name: str
    out_features: int
    in_features: int
    sources: tuple[str, ...]
    experts: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Module path of each matrix, by expert."""
        if self.experts is None:
            return (self.name,)
        return tuple(self.name.replace(EXPERT, str(expert)) for expert in range(self.experts))

    @property
    def parameters(self) -> int:
        """Number of weights of all matrices."""
        return (self.experts or 1) * self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Linears that the runtime holds as one matrix (per expert), stacked along the rows: q/k/v, gate/up.

    They read the tensor that `input` names and share NVFP4's global scales. `parameters` are the weights in the block's
    module: one of each Linear, or one packed (experts, rows, columns).
    """

    name: str
    input: str
    linears: tuple[LinearSpec, ...]
    parameters: tuple[str, ...]

    @property
    def experts(self) -> int | None:
        """How many experts have this matrix; None for a matrix by itself."""
        return self.linears[0].experts

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.linears[0].in_features

    @property
    def rows(self) -> tuple[slice, ...]:
        """Where each Linear is in the matrix."""
        stops = accumulate((linear.out_features for linear in self.linears), initial=0)
        return tuple(slice(start, stop) for start, stop in pairwise(stops))


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedGroup:
    """Matrices that must have one format: one allocator item. More than one only for the experts of a layer.

    `name` is the runtime's name for it, or the Linear's own when it is alone; `head` says that it is the output head.
    """

    name: str
    matrices: tuple[Matrix, ...]
    head: bool = False

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every Linear of it, in order."""
        return tuple(linear for matrix in self.matrices for linear in matrix.linears)

    @property
    def experts(self) -> int | None:
        """How many experts it belongs to, or None."""
        return self.matrices[0].experts

    @property
    def parameters(self) -> int:
        """Number of weights of all members."""
        return sum(linear.parameters for linear in self.linears)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputGroup:
    """Matrices that read the same tensor: one Hessian and one Cholesky factor (per expert)."""

    name: str
    matrices: tuple[Matrix, ...]

    @property
    def in_features(self) -> int:
        """Width of the shared input."""
        return self.matrices[0].in_features

    @property
    def experts(self) -> int | None:
        """How many experts read their share of it, or None."""
        return self.matrices[0].experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A tensor of a block's module and the checkpoint tensors it is read from, concatenated along the rows.

    With `transposed` the checkpoint has the last two dimensions of a stack in the other order.
    """

    name: str
    tensors: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedAttention:
    """An attention whose keys and values a server caches: its module path in the repository, and in its block."""

    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """The smallest unit that is loaded and run, e.g. one decoder layer. `prefix` is its module path.

    `attention` are those of its modules whose cache can be rounded.
    """

    index: int
    kind: BlockKind
    prefix: str
    parameters: tuple[Parameter, ...]
    groups: tuple[FusedGroup, ...]
    source_bytes: int
    attention: tuple[CachedAttention, ...] = ()

    @property
    def key(self) -> str:
        """Its name in the run store."""
        return f"{self.index:04d}"

    @property
    def structure(self) -> tuple[object, ...]:
        """Names of its parameters and shapes of its Linears: blocks of a kind with equal ones are built alike."""
        linears = tuple((linear.out_features, linear.in_features, linear.experts) for linear in self.linears)
        return tuple(parameter.name for parameter in self.parameters), linears

    @property
    def tensors(self) -> tuple[str, ...]:
        """Checkpoint tensors it loads."""
        return tuple(tensor for parameter in self.parameters for tensor in parameter.tensors)

    @cached_property
    def inputs(self) -> tuple[InputGroup, ...]:
        """Its matrices by input, in order of first appearance."""
        found: dict[str, list[Matrix]] = {}
        for group in self.groups:
            for matrix in group.matrices:
                found.setdefault(matrix.input, []).append(matrix)
        return tuple(InputGroup(name=name, matrices=tuple(matrices)) for name, matrices in found.items())

    def reading(self, group: InputGroup) -> list[tuple[FusedGroup, Matrix]]:
        """The matrices that read an input, each with its fused group, in the order of the groups."""
        return [(fused, matrix) for fused in self.groups for matrix in fused.matrices if matrix.input == group.name]

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every quantizable Linear, in order."""
        return tuple(linear for group in self.groups for linear in group.linears)


#: The family of an architecture that has none.
GENERIC = "generic"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model as the quantizer sees it.

    `embedding`, `pixels` and `head` name the tensors that the entry of the model, the entry of its vision tower and its
    exit load (entry and exit share the embedding when it is tied). `ignored` gives the reason for every matrix that
    stays as it is, by module path. `facts` were learned of an architecture without a family, `guesses` are assumed.
    `spellings` are those of runtimes that do not spell modules as the checkpoint does; `named_by` is the runtime whose
    own names and fused Linears are known, None where they are assumed. `image_token` is the id that stands for a piece
    of an image, `top_k` how many experts a token meets, `row_width` how many values a token has between decoder blocks:
    more than `hidden_size` where they hand on more than a hidden state. `tied` names embedding and output head where
    the configuration ties them and the checkpoint stores both. `kept_cache` says why the KV cache cannot be rounded,
    None where it can.
    """

    architecture: str
    family: str
    blocks: tuple[Block, ...]
    embedding: tuple[str, ...]
    pixels: tuple[str, ...]
    head: tuple[str, ...]
    ignored: dict[str, str]
    facts: tuple[str, ...]
    guesses: tuple[str, ...]
    spellings: tuple[Spelling, ...]
    named_by: str | None
    hidden_size: int
    vocab_size: int
    image_token: int | None
    top_k: int
    row_width: int
    tied: tuple[str, str] | None = None
    kept_cache: str | None = None

    @cached_property
    def groups(self) -> tuple[FusedGroup, ...]:
        """Every fused group of the model, in block order: the allocator's items."""
        return tuple(group for block in self.blocks for group in block.groups)

    @cached_property
    def block_of(self) -> dict[str, Block]:
        """Fused-group name → the block that holds it."""
        return {group.name: block for block in self.blocks for group in block.groups}

    @property
    def parameters(self) -> int:
        """Weights of all quantizable Linears: the denominator of bits per parameter."""
        return sum(group.parameters for group in self.groups)

    @cached_property
    def attention(self) -> tuple[CachedAttention, ...]:
        """Every attention whose cache can be rounded, in order."""
        return tuple(each for block in self.blocks for each in block.attention)

    @cached_property
    def structures(self) -> tuple[Block, ...]:
        """The first of the blocks that have one kind, and the same parameters and shapes, in order."""
        first: dict[object, Block] = {}
        for block in self.blocks:
            first.setdefault((block.kind, block.structure), block)
        return tuple(first.values())

    def of(self, *kinds: BlockKind) -> tuple[Block, ...]:
        """Blocks of these kinds, in order."""
        return tuple(block for block in self.blocks if block.kind in kinds)

    def linears(self) -> Iterator[LinearSpec]:
        """Every quantizable Linear, in order."""
        return (linear for group in self.groups for linear in group.linears)

    def aliases_of(self, name: str) -> tuple[str, ...]:
        """Every name that a runtime may know a module of the checkpoint by, the checkpoint's own first."""
        return tuple(names[0] for names in self.spelled([name]))

    def spelled(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Names of modules in every spelling, each spelling once, the checkpoint's own first."""
        return spelled(names, self.spellings)


def spelled(names: Sequence[str], spellings: Sequence[Spelling]) -> tuple[tuple[str, ...], ...]:
    """Names of modules in these spellings, each spelling once, their own first."""
    every = [tuple(names), *(tuple(spelling.of(name) for name in names) for spelling in spellings)]
    return tuple(dict.fromkeys(every))
