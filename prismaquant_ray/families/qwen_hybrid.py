"""Qwen3.5 and Qwen3.6: gated DeltaNet and full attention, dense or routed MLPs, a vision tower, a draft head.

vLLM fuses `in_proj_qkv` with `in_proj_z` and `in_proj_b` with `in_proj_a`; all four read the same tensor. Routed
experts are stored packed.
"""

from dataclasses import replace

from prismaquant_ray.families.base import ATTENTION, GATED_MLP, ROUTER, Family, FusedRule, Vision
from prismaquant_ray.spelling import Spelling

_FUSED = (
    ATTENTION,
    GATED_MLP,
    FusedRule(name="in_proj_qkvz", members=("in_proj_qkv", "in_proj_z")),
    FusedRule(name="in_proj_ba", members=("in_proj_b", "in_proj_a")),
)
_SIBLINGS = (("in_proj_qkvz", "in_proj_ba"),)
_IGNORED = (
    ("gate", ROUTER),
    ("shared_expert_gate", "gate of the shared expert: one row, read by no quantized kernel"),
    ("conv1d", "short convolution, not a Linear"),
    ("fc", "vLLM is about to load it in BF16 only"),
    ("patch_embed.proj", "convolution over pixels; the runtime loads it in BF16 only"),
    ("pos_embed", "position table; embeddings are never quantized"),
)

VISION_LANGUAGE = Family(
    name="qwen3.5",
    architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
    blocks="model.language_model.layers",
    fused=_FUSED,
    siblings=_SIBLINGS,
    ignored=_IGNORED,
    # The same weights loaded as a text-only model.
    spellings=(Spelling(prefixes=(("model.language_model.", "model."),)),),
    vision=Vision(tower="model.visual", blocks="blocks", merger="merger", entry=("patch_embed", "pos_embed")),
    draft="mtp",
)

TEXT = replace(
    VISION_LANGUAGE,
    name="qwen3.5-text",
    architectures=("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
    blocks="model.layers",
    spellings=(),
    vision=None,
)
