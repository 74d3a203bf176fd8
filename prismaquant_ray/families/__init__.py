"""Families: facts that cannot be derived from a model's own code. One short file each, listed here.

To add one, state which projections the serving runtime fuses and which modules must stay unquantized, and why:
docs/adding-a-model.md.
"""

from __future__ import annotations

from prismaquant_ray.families import deepseek, gemma, gpt_oss, llama, mixtral, qwen, qwen_hybrid, qwen_moe
from prismaquant_ray.families.base import Family, FusedRule

__all__ = ["FAMILIES", "Family", "FusedRule", "family_of"]

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    qwen.FAMILY,
    qwen_moe.FAMILY,
    qwen_hybrid.VISION_LANGUAGE,
    qwen_hybrid.TEXT,
    gemma.FAMILY,
    mixtral.FAMILY,
    deepseek.FAMILY,
    gpt_oss.FAMILY,
)


def family_of(architecture: str) -> Family | None:
    """The family that serves an architecture (a class name of transformers), or None."""
    return next((family for family in FAMILIES if architecture in family.architectures), None)
