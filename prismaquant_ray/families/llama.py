"""Llama and models with its layer structure."""

from prismaquant_ray.families.base import ATTENTION, GATED_MLP, Family

FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    blocks="model.layers",
    fused=(ATTENTION, GATED_MLP),
)
