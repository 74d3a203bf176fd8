"""The layout of one block: its parameters, and its matrices by what a runtime fuses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.families import Family
from prismaquant_ray.families.base import NOT_A_LINEAR
from prismaquant_ray.layout import Block, BlockKind, CachedAttention, FusedGroup, LinearSpec, Matrix, Parameter
from prismaquant_ray.model.attention_cache import cached_paths
from prismaquant_ray.model.experts import is_packed, unquantizable
from prismaquant_ray.model.naming import Naming
from prismaquant_ray.model.rehearsal import NOTHING, Found
from prismaquant_ray.source.protocol import TensorSource, tensor_of_shape
from prismaquant_ray.spelling import EXPERT

WEIGHT = ".weight"


class BlockLayouts:
    """Makes blocks of modules. `ignored` collects the matrices that stay, with the reason."""

    def __init__(self, checkpoint: TensorSource, names: Naming, family: Family, ignored: dict[str, str]) -> None:
        self.checkpoint = checkpoint
        self.names = names
        self.family = family
        self.ignored = ignored
        self.reasons = dict(family.ignored)
        self.rule_of = {member: rule for rule in family.fused for member in rule.members}
        self.siblings = {name: names[0] for names in family.siblings for name in names}
        #: Why the KV cache cannot be rounded, if something was found.
        self.kept_cache: str | None = None

    def block(self, index: int, kind: BlockKind, prefix: str, module: nn.Module, found: Found = NOTHING) -> Block:
        """Block `index` of a module at the path `prefix`; InputError for a tensor that is missing or misshapen."""
        parameters, matrices = self.parameters(prefix, module), self.matrices(prefix, module, found=found)
        return self.block_of(index, kind, prefix, parameters, matrices, self._attention(kind, prefix, module))

    def block_of(
        self,
        index: int,
        kind: BlockKind,
        prefix: str,
        parameters: tuple[Parameter, ...],
        matrices: Sequence[Matrix],
        attention: tuple[CachedAttention, ...] = (),
    ) -> Block:
        """Block `index` of these parameters and matrices."""
        by_item: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            # All projections of all experts of a layer are one item.
            name = matrix.name if matrix.experts is None else matrix.name.rpartition(".")[0]
            by_item.setdefault(name, []).append(matrix)
        return Block(
            index=index,
            kind=kind,
            prefix=prefix,
            parameters=parameters,
            groups=tuple(
                FusedGroup(name=name, matrices=tuple(members), head=kind is BlockKind.HEAD)
                for name, members in by_item.items()
            ),
            source_bytes=sum(
                self.checkpoint.tensors[tensor].nbytes for parameter in parameters for tensor in parameter.tensors
            ),
            attention=attention,
        )

    def _attention(self, kind: BlockKind, prefix: str, module: nn.Module) -> tuple[CachedAttention, ...]:
        """The attentions of a block whose cache is seen; none in a vision tower, which has none."""
        if kind not in (BlockKind.DECODER, BlockKind.DRAFT):
            return ()
        paths, unseen = cached_paths(module)
        found = [(self.names.module(".".join(part for part in (prefix, path) if part)), path) for path in paths]
        lost = next((name for name, _ in found if name.rpartition(".")[2] == "attn"), None)
        if unseen is not None:
            self.kept_cache = f"{unseen} does more with its cache than to add keys and values to it"
        elif lost is not None:
            self.kept_cache = f"vLLM does not find scales of a module that is called {lost}"
        return tuple(CachedAttention(name=name, path=path) for name, path in found)

    def parameters(self, prefix: str, module: nn.Module) -> tuple[Parameter, ...]:
        """Every parameter and persistent buffer of a module at `prefix`."""
        packed = {f"{path}." if path else "": entry for path, entry in module.named_modules() if is_packed(entry)}
        found = []
        for name, tensor in module.state_dict(keep_vars=True).items():
            path, _, leaf = name.rpartition(".")
            parameter = f"{prefix}.{name}" if prefix else name
            full, transposed = self.names.tensor(parameter), self.names.is_transposed(parameter)
            if f"{path}." in packed and full not in self.checkpoint.tensors and tensor.ndim == 3:
                experts = self.names.module(f"{prefix}.{path}" if prefix else path)
                tensors = self._unpacked(experts, leaf, tuple(tensor.shape))
            elif self.names.parts(parameter):
                tensors = self._parts(parameter, tuple(tensor.shape))
            else:
                shape = tuple(tensor.transpose(-1, -2).shape if transposed else tensor.shape)
                tensors = (tensor_of_shape(self.checkpoint, full, shape),)
            found.append(Parameter(name=name, tensors=tensors, transposed=transposed))
        return tuple(found)

    def _parts(self, parameter: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The tensors that a parameter is made of, one on top of the other."""
        tensors = self.names.parts(parameter)
        shapes = [self.checkpoint.tensors[name].shape for name in tensors]
        if sum(map(math.prod, shapes)) != math.prod(shape) or {each[-1] for each in shapes} != {shape[-1]}:
            raise InputError(
                f"{self.checkpoint.store.uri}: {parameter} has shape {shape}, which {len(tensors)} tensors of shape "
                f"{shapes[0]} ({tensors[0]} the first) do not make up"
            )
        return tensors

    def _unpacked(self, experts: str, leaf: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The tensors of a packed parameter that is stored expert by expert, in the order of its rows."""
        names = self.family.experts
        members = (names.gate, names.up) if leaf == "gate_up_proj" else (names.down,)
        rows = shape[1] // len(members)
        return tuple(
            tensor_of_shape(self.checkpoint, f"{experts}.{expert}.{member}{WEIGHT}", (rows, shape[2]))
            for expert in range(shape[0])
            for member in members
        )

    def matrices(self, prefix: str, module: nn.Module, relative: str = "", found: Found = NOTHING) -> list[Matrix]:
        """Matrices that may be quantized; every other matrix is ignored, with the reason."""
        linears: dict[str, tuple[LinearSpec, str]] = {}
        experts: list[Matrix] = []
        for path, entry in module.named_modules():
            if not any(parameter.ndim > 1 for parameter in entry.parameters(recurse=False)):
                continue
            full = ".".join(part for part in (prefix, path) if part)
            name = self.names.module(full)
            reason = self._stays(".".join(part for part in (relative, path) if part), path, full, entry, found)
            if reason is not None:
                self.ignored[name] = reason
            elif is_packed(entry):
                experts += self._experts(name, path, entry)
            else:
                linears[path] = _linear(name, entry), f"{path}{WEIGHT}"
        paths = frozenset(path for path, entry in module.named_modules() if isinstance(entry, nn.Linear))
        for path in [*linears]:
            staying = next((each for each in self._fused(path, paths) if each not in linears), None)
            if staying is not None:
                self.ignored[linears.pop(path)[0].name] = f"the runtime fuses it with {staying}, which stays"
        by_name: dict[str, list[tuple[LinearSpec, str]]] = {}
        for path, linear in linears.items():
            by_name.setdefault(self._fused_name(path, linear[0].name, paths, linears, found), []).append(linear)
        return [*(self._dense(name, members) for name, members in by_name.items()), *experts]

    def _stays(self, inside: str, path: str, full: str, module: nn.Module, found: Found) -> str | None:
        """Why a module's matrix is not quantized; None if it may be. `inside` is its path in the family's terms."""
        leaf = path.rpartition(".")[2]
        reason = self.reasons.get(inside, self.reasons.get(leaf, found.kept.get(path)))
        if reason is not None:
            return reason
        if self.names.parts(f"{full}{WEIGHT}"):
            return "the checkpoint has its rows in several tensors"
        if is_packed(module):
            return unquantizable(module) or self.names.strange_stack(full)
        return None if isinstance(module, nn.Linear) else NOT_A_LINEAR

    def _fused_name(
        self, path: str, name: str, paths: frozenset[str], linears: Mapping[str, object], found: Found
    ) -> str:
        """The name of the matrix that a Linear is part of: its own where it is fused with no other."""
        parent, dot, _ = name.rpartition(".")
        if self._fused(path, paths):
            return f"{parent}{dot}{self.rule_of[path.rpartition('.')[2]].name}"
        # What reads one tensor may be fused by a runtime that nobody has described.
        members = next((members for members in found.together if path in members), ())
        alike = [each.rpartition(".")[2] for each in members if each in linears and not self._fused(each, paths)]
        return f"{parent}{dot}{'_'.join(alike)}" if len(alike) > 1 else name

    def _fused(self, path: str, paths: frozenset[str]) -> tuple[str, ...]:
        """Members of the rule that a Linear falls under. It holds where all are: one alone is a matrix by itself."""
        parent, dot, leaf = path.rpartition(".")
        rule = self.rule_of.get(leaf)
        members = () if rule is None else tuple(f"{parent}{dot}{each}" for each in rule.members)
        return members if paths.issuperset(members) else ()

    def _dense(self, name: str, members: list[tuple[LinearSpec, str]]) -> Matrix:
        parent, dot, leaf = name.rpartition(".")
        return Matrix(
            name=name,
            input=f"{parent}{dot}{self.siblings.get(leaf, leaf)}",
            linears=tuple(linear for linear, _ in members),
            parameters=tuple(parameter for _, parameter in members),
        )

    def _experts(self, name: str, path: str, module: Any) -> list[Matrix]:
        """gate/up and down of every expert."""
        names = self.family.experts
        matrices = []
        for leaf, members in (("gate_up_proj", (names.gate, names.up)), ("down_proj", (names.down,))):
            experts, rows, columns = getattr(module, leaf).shape
            packed = f"{name}.{leaf}"
            linears = tuple(
                LinearSpec(
                    name=f"{name}.{EXPERT}.{member}",
                    out_features=rows // len(members),
                    in_features=columns,
                    experts=experts,
                    sources=(packed,)
                    if packed in self.checkpoint.tensors
                    else tuple(f"{name}.{expert}.{member}{WEIGHT}" for expert in range(experts)),
                )
                for member in members
            )
            parameter = f"{path}.{leaf}" if path else leaf
            matrices.append(Matrix(name=packed, input=packed, linears=linears, parameters=(parameter,)))
        return matrices


def _linear(name: str, module: nn.Linear) -> LinearSpec:
    return LinearSpec(
        name=name, out_features=module.out_features, in_features=module.in_features, sources=(f"{name}{WEIGHT}",)
    )
