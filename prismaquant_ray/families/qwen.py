"""Qwen2 and Qwen3, dense. Qwen2's q/k/v biases and Qwen3's q/k norms are copied."""

from prismaquant_ray.families.base import ATTENTION, GATED_MLP, Family

FAMILY = Family(
    name="qwen",
    architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    blocks="model.layers",
    fused=(ATTENTION, GATED_MLP),
)
