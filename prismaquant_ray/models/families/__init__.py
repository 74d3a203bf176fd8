"""Families: what cannot be derived from a model's own code. One short file each, listed here.

To add one, state which projections the serving runtime fuses and what must stay unquantized, and why.
"""

from __future__ import annotations

from prismaquant_ray.models.families import gemma, llama, qwen
from prismaquant_ray.models.families.base import Family, FusedRule

__all__ = ["FAMILIES", "Family", "FusedRule", "family_of"]

FAMILIES: tuple[Family, ...] = (llama.FAMILY, qwen.FAMILY, gemma.FAMILY)


def family_of(architecture: str) -> Family | None:
    """The family that serves an architecture (a class name of transformers), or None."""
    return next((family for family in FAMILIES if architecture in family.architectures), None)
