"""The parts of a model as names and shapes: blocks, input groups, fused groups, Linears.

A layout is built from the configuration and the safetensors headers only (`models.inspect`). It is the one
place where module names are parsed; everything after works with these objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """One Linear that may be quantized. `name` is its module path in the source checkpoint."""

    name: str
    out_features: int
    in_features: int

    @property
    def weight(self) -> str:
        """Name of its weight in the source checkpoint."""
        return f"{self.name}.weight"

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedGroup:
    """Linears the serving runtime fuses: one format, one NVFP4 global scale, one allocator item.

    Members read the same input. `name` is the runtime's name for them, or the Linear's own when it is alone.
    """

    name: str
    linears: tuple[LinearSpec, ...]

    @property
    def parameters(self) -> int:
        """Number of weights of all members."""
        return sum(linear.parameters for linear in self.linears)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputGroup:
    """Fused groups whose members read the same tensor: one Hessian, one Cholesky factor."""

    name: str
    groups: tuple[FusedGroup, ...]

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every Linear that reads this input, in order."""
        return tuple(linear for group in self.groups for linear in group.linears)

    @property
    def in_features(self) -> int:
        """Width of the shared input."""
        return self.groups[0].linears[0].in_features


@dataclass(frozen=True, kw_only=True)
class Block:
    """The smallest unit that is loaded and run: one decoder layer.

    `prefix` is its module path; `tensors` are the names of everything it loads, in checkpoint order.
    """

    index: int
    prefix: str
    tensors: tuple[str, ...]
    inputs: tuple[InputGroup, ...]
    source_bytes: int

    @property
    def key(self) -> str:
        """Its name in the run store."""
        return f"{self.index:04d}"

    @cached_property
    def groups(self) -> tuple[FusedGroup, ...]:
        """Every fused group, in order."""
        return tuple(group for entry in self.inputs for group in entry.groups)

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every quantizable Linear, in order."""
        return tuple(linear for group in self.groups for linear in group.linears)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model as the quantizer sees it.

    `embedding` and `head` name the tensors that the entry and the exit of the model load (they share the
    embedding when it is tied). `kept` gives the reason for every Linear that stays as it is, by module path.
    `guesses` is empty for a known family; otherwise it says what was assumed.
    """

    architecture: str
    family: str
    blocks: tuple[Block, ...]
    embedding: tuple[str, ...]
    head: tuple[str, ...]
    kept: dict[str, str]
    guesses: tuple[str, ...]
    hidden_size: int
    vocab_size: int

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

    def linears(self) -> Iterator[LinearSpec]:
        """Every quantizable Linear, in order."""
        return (linear for group in self.groups for linear in group.linears)
