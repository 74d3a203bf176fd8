"""Gemma 1, 2 and 3 (text). Soft-capping, scaled embeddings and sliding windows are the model's own code."""

from prismaquant_ray.families.base import ATTENTION, GATED_MLP, Family

FAMILY = Family(
    name="gemma",
    architectures=("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    blocks="model.layers",
    fused=(ATTENTION, GATED_MLP),
)
