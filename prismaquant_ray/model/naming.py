"""How a checkpoint calls the parameters and modules of a model."""

from __future__ import annotations

from prismaquant_ray.families import Family
from prismaquant_ray.model.meta_model import MetaModel
from prismaquant_ray.model.unknown_family import Derived

_STACK = ".gate_up_proj"


class Naming:
    """Names by a family's rules, or by transformers' own where there is no family."""

    def __init__(self, family: Family, meta_model: MetaModel, unknown: Derived | None) -> None:
        self._family = family
        self._meta_model = meta_model
        self._unknown = unknown

    def tensor(self, parameter: str) -> str:
        """The checkpoint's name of a parameter; InputError where transformers computes it."""
        if self._unknown is None:
            return self._family.checkpoint_name(parameter)
        found = self._unknown.stored.tensor(parameter)
        if found != parameter:
            self._meta_model.parameter_of[found] = parameter
        return found

    def parts(self, parameter: str) -> tuple[str, ...]:
        """The checkpoint's tensors of a parameter that it has in parts, on top of each other; none of another."""
        return () if self._unknown is None else self._unknown.stored.parts(parameter)

    def is_transposed(self, parameter: str) -> bool:
        """Whether the checkpoint has the matrices of a stack transposed."""
        return self._unknown is not None and parameter in self._unknown.stored.transposed

    def module(self, path: str) -> str:
        """The checkpoint's name of a module."""
        return self._family.checkpoint_name(path) if self._unknown is None else self._unknown.stored.module(path)

    def runs(self, path: str) -> bool:
        """Whether a module outside the blocks runs on text."""
        return self._unknown is None or path in self._unknown.resident

    def strange_stack(self, path: str) -> str | None:
        """Why packed experts that the checkpoint has under other names stay: nobody has quantized Linears of them."""
        stored = self.tensor(f"{path}{_STACK}")
        if self._unknown is None or stored == f"{path}{_STACK}" or stored.endswith(_STACK):
            return None
        return f"experts that are stored as {stored.rpartition('.')[0].rpartition('.')[2]}"

    def tensors_of_towers(self) -> frozenset[str]:
        """Tensors of modules outside the blocks that do not run on text."""
        if self._unknown is None:
            return frozenset()
        blocks = f"{self._meta_model.blocks_path}."
        return frozenset(
            tensor
            for parameter, tensors in self._unknown.stored.tensors.items()
            for tensor in tensors
            if not parameter.startswith(blocks) and not self.runs(parameter.rpartition(".")[0])
        )
