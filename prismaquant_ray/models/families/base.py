"""What a family states."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedRule:
    """Sibling Linears the runtime fuses into one matrix named `name`; they read the same input."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """An architecture family.

    `blocks` is the module path of the decoder's layer list. `kept` maps the last part of a module name to the
    reason it is never quantized.
    """

    name: str
    architectures: tuple[str, ...]
    blocks: str
    fused: tuple[FusedRule, ...]
    kept: tuple[tuple[str, str], ...] = ()


ATTENTION = FusedRule(name="qkv_proj", members=("q_proj", "k_proj", "v_proj"))
GATED_MLP = FusedRule(name="gate_up_proj", members=("gate_proj", "up_proj"))
