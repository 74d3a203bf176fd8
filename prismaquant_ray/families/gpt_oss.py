"""GPT-OSS in BF16: its attention is quantized; its experts have biases and a layout of their own and stay."""

from prismaquant_ray.families.base import ATTENTION, ROUTER, Family
from prismaquant_ray.layout import NameAlias

FAMILY = Family(
    name="gpt-oss",
    architectures=("GptOssForCausalLM",),
    blocks="model.layers",
    fused=(ATTENTION,),
    ignored=(("router", ROUTER), ("lm_head", "vLLM loads this model's head in BF16 only")),
    aliases=(NameAlias(part="self_attn", names=("self_attn", "attn")),),
)
