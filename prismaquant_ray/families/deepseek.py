"""DeepSeek-V3: latent attention, shared and routed experts. Weights of the released checkpoint are FP8 by blocks."""

from prismaquant_ray.families.base import GATED_MLP, LATENT, ROUTER, Family

FAMILY = Family(
    name="deepseek-v3",
    architectures=("DeepseekV3ForCausalLM",),
    blocks="model.layers",
    fused=(*LATENT.fused, GATED_MLP),
    ignored=(("gate", ROUTER), *LATENT.ignored),
)
