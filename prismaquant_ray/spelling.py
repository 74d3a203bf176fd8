"""How a runtime spells the names of a checkpoint's modules."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Stands for the number of an expert in the name of a Linear that every expert of a layer has.
EXPERT = "{}"
# A number that no model has, where a rule may ask for one.
_NUMBER = "918273645"
_WEIGHT = ".weight"

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """Renames, each applied in turn to what the one before it left.

    In this order: `regex` replaces what a pattern finds, `parts` the first place of a text, `prefixes` and `suffixes` a
    text at either end. Source: vLLM's `WeightsMapper` (`vllm/model_executor/models/utils.py`, 0.32).
    """

    regex: Renames = ()
    parts: Renames = ()
    prefixes: Renames = ()
    suffixes: Renames = ()

    def of(self, module: str) -> str:
        """The runtime's name of a module."""
        # The rules are made for the names of weights: many end in a dot.
        renamed = self._renamed(module.replace(EXPERT, _NUMBER) + _WEIGHT)
        if not renamed.endswith(_WEIGHT):
            return module
        return renamed.removesuffix(_WEIGHT).replace(_NUMBER, EXPERT)

    def _renamed(self, name: str) -> str:
        for pattern, new in self.regex:
            name = re.sub(pattern, new, name)
        for old, new in self.parts:
            name = name.replace(old, new, 1)
        for old, new in self.prefixes:
            if name.startswith(old):
                name = new + name[len(old) :]
        for old, new in self.suffixes:
            if name.endswith(old):
                name = name[: -len(old)] + new
        return name
