"""Where a checkpoint stores each parameter of a model, by transformers' own rules for loading it.

transformers renames tensors, adds or removes prefixes, stacks experts that are stored one by one and transposes stacks
when it loads a checkpoint, and puts parts on top of each other. The same rules are inverted here. What it computes
otherwise (split or interleaved weights) could not be written back and is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prismaquant_ray.errors import InputError
from prismaquant_ray.families.base import ExpertNames
from prismaquant_ray.model.meta_model import MetaModel
from prismaquant_ray.source.header import TensorInfo

_EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversions:
    """Tensors of each parameter that is stored, experts in order, gate before up; and what others are computed by.

    `transposed` are the parameters whose tensor is a stack of transposed matrices.
    """

    tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    def tensor(self, parameter: str) -> str:
        """The tensor that is a parameter, or would be; InputError for one that is computed."""
        if parameter in self.computed:
            raise InputError(
                f"{parameter} is made of {self.tensors[parameter][0]} by {self.computed[parameter]} when transformers "
                "loads it, which cannot be written back; save the model with transformers and its weights as they are "
                "in memory (save_original_format=False)"
            )
        found = self.tensors.get(parameter, ())
        return found[0] if len(found) == 1 else parameter

    def parts(self, parameter: str) -> tuple[str, ...]:
        """The tensors that make up a parameter, on top of each other; none where one tensor is all of it."""
        found = self.tensors.get(parameter, ())
        return found if len(found) > 1 and parameter not in self.computed else ()

    def module(self, path: str) -> str:
        """The checkpoint's name of a module: that of its weight, or of its experts."""
        weight = self.tensors.get(f"{path}.weight", ())
        if len(weight) == 1 and weight[0].endswith(".weight"):
            return weight[0].removesuffix(".weight")
        stack = self.tensors.get(f"{path}.gate_up_proj", ())
        if not stack:
            return path
        expert = _EXPERT.fullmatch(stack[0])
        return stack[0].rpartition(".")[0] if expert is None else expert[1]

    @property
    def experts(self) -> ExpertNames:
        """How the Linears of an expert are called."""
        members: dict[str, list[str]] = {}
        for parameter, tensors in self.tensors.items():
            leaf = parameter.rpartition(".")[2]
            if len(tensors) > 1 and leaf in ("gate_up_proj", "down_proj"):
                found = (_EXPERT.fullmatch(tensor) for tensor in tensors)
                members.setdefault(leaf, list(dict.fromkeys(match[3] for match in found if match is not None)))
        gate_up, down = members.get("gate_up_proj", []), members.get("down_proj", [])
        return (
            ExpertNames(gate=gate_up[0], up=gate_up[1], down=down[0]) if len(gate_up) == 2 and down else ExpertNames()
        )


def conversions_of(meta_model: MetaModel, stored: Mapping[str, TensorInfo]) -> Conversions:
    """Conversions of the tensors of a checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = meta_model.model
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state = meta_model.state
    found: dict[str, list[tuple[int, int, str]]] = {}
    computed: dict[str, str] = {}
    transposed: set[str] = set()
    for name, info in stored.items():
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        place = 0
        if pattern is not None:
            converter = next(each for each in converters if pattern in each.source_patterns)
            place = converter.source_patterns.index(pattern)
            operations = [type(each).__name__ for each in converter.operations]
            if len(info.shape) == 3 and swaps_rows(converter.operations):
                # transformers looks at the shapes, too: both orders are found.
                if info.shape != state.get(parameter):
                    transposed.add(parameter)
            elif not _stacks(converter.operations) or len(converter.target_patterns) > 1:
                computed[parameter] = " and ".join(operations)
        if parameter in state:
            found.setdefault(parameter, []).append((_number(name), place, name))
    tensors = {parameter: tuple(name for *_, name in sorted(parts)) for parameter, parts in found.items()}
    return Conversions(
        tensors=tensors,
        computed={name: by for name, by in computed.items() if name in tensors},
        transposed=frozenset(transposed),
    )


def _stacks(operations: Sequence[Any]) -> bool:
    """Whether it puts rows behind rows: experts, in each of them gate over up, or parts of another parameter."""
    names = [type(each).__name__ for each in operations]
    return merges_experts(operations) or (names == ["Concatenate"] and operations[0].dim == 0)


def merges_experts(operations: Sequence[Any]) -> bool:
    """Whether it stacks the matrices of experts, in each of them gate over up."""
    names = [type(each).__name__ for each in operations]
    return names == ["MergeModulelist"] or (names == ["MergeModulelist", "Concatenate"] and operations[1].dim == 1)


def swaps_rows(operations: Sequence[Any]) -> bool:
    """Whether it transposes the matrices of a stack unless they have the right shape."""
    return all(
        type(each).__name__ == "Transpose" and each.check_dims and {each.dim0, each.dim1} == {1, 2}
        for each in operations
    )


def _number(name: str) -> int:
    """Of the expert that a tensor belongs to."""
    expert: Any = _EXPERT.fullmatch(name)
    return int(expert[2]) if expert is not None else 0
