"""DeepSeek-V3: latent attention, shared and routed experts. Weights of the released checkpoint are FP8 by blocks."""

from prismaquant_ray.families.base import GATED_MLP, ROUTER, Family, FusedRule

FAMILY = Family(
    name="deepseek-v3",
    architectures=("DeepseekV3ForCausalLM",),
    blocks="model.layers",
    fused=(FusedRule(name="fused_qkv_a_proj", members=("q_a_proj", "kv_a_proj_with_mqa")), GATED_MLP),
    ignored=(
        ("gate", ROUTER),
        ("kv_b_proj", "the runtime absorbs it into latent attention, which multiplies in 16 bits"),
    ),
)
