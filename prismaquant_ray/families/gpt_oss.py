"""GPT-OSS in BF16: its attention is quantized; its experts have biases and a layout of their own and stay."""

from prismaquant_ray.families.base import ATTENTION, ROUTER, Family

FAMILY = Family(
    name="gpt-oss",
    architectures=("GptOssForCausalLM",),
    blocks="model.layers",
    fused=(ATTENTION,),
    ignored=(("router", ROUTER), ("lm_head", "vLLM loads this model's head in BF16 only")),
)
