"""Qwen3-MoE: Qwen3's attention over routed experts. Experts are stored one by one."""

from prismaquant_ray.families.base import ATTENTION, GATED_MLP, ROUTER, Family

FAMILY = Family(
    name="qwen3-moe",
    architectures=("Qwen3MoeForCausalLM",),
    blocks="model.layers",
    fused=(ATTENTION, GATED_MLP),
    ignored=(("gate", ROUTER),),
)
