"""Tiny checkpoints of architectures, nearly all without a family, as their own `save_pretrained` lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny import tokenizer

VOCABULARY = 320
_USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    # Heads of 32, the least that vLLM's attention on a CPU takes.
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
# More blocks than the decoder has.
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [8, 4, 4], "rope_theta": 10000.0}
_DEEPSTACK: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
    "deepstack_visual_indexes": [1],
}
_VISUAL: dict[str, Any] = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
#: The rotary table that vLLM's CPU build has for latent attention.
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
# And its widths.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "rope_parameters": YARN,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


class Architecture(NamedTuple):
    """A class of transformers, its configuration, and the Linears that must stay, by the end of their names.

    `unserved` says why vLLM does not show it here; None where it does.
    """

    name: str
    config: Mapping[str, Any]
    kept: tuple[str, ...] = ()
    config_name: str = ""
    unserved: str | None = None


def _usual(name: str, *kept: str, config_name: str = "", unserved: str | None = None, **other: Any) -> Architecture:
    return Architecture(name, {**_USUAL, **other}, kept, config_name, unserved)


WORKING: dict[str, Architecture] = {
    "apertus": _usual("ApertusForCausalLM"),
    # Its layers return two things.
    "bamba": _usual(
        "BambaForCausalLM", attn_layer_indices=[1], unserved="it does not know the architecture", **_MAMBA
    ),
    "bloom": Architecture(
        "BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    ),
    "cohere2": _usual("Cohere2ForCausalLM", sliding_window=24),
    # It scales what the embedding returns in place.
    "ctrl": Architecture(
        "CTRLLMHeadModel", {"vocab_size": VOCABULARY, "n_embd": 128, "dff": 256, "n_layer": 2, "n_head": 4},
        unserved="it does not know the architecture",
    ),
    "deepseek_v2": _usual("DeepseekV2ForCausalLM", "kv_b_proj", q_lora_rank=None, **_LATENT),
    "deepseek_v32": _usual(
        "DeepseekV32ForCausalLM", "indexer.wq_b", "kv_b_proj", q_lora_rank=32, index_n_heads=4, index_head_dim=128,
        index_topk=8, unserved="sparse attention does not run on its CPU build", **_LATENT,
    ),
    "falcon": Architecture(
        "FalconForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2,
                              "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "falcon_h1": _usual("FalconH1ForCausalLM", head_dim=32, mamba_d_ssm=256, mamba_rms_norm=False, **_MAMBA),
    "gpt_bigcode": Architecture("GPTBigCodeForCausalLM", _GPT),
    "gptj": Architecture("GPTJForCausalLM", {**_GPT, "rotary_dim": 8}),
    "granite_hybrid": _usual(
        "GraniteMoeHybridForCausalLM", num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=64,
        layer_types=["mamba", "attention"], **_MAMBA,
    ),
    "granite_hybrid_moe": _usual(
        "GraniteMoeHybridForCausalLM", "block_sparse_moe.router.layer", "block_sparse_moe.input_linear",
        num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64, layer_types=["mamba", "attention"],
        **_MAMBA,
    ),
    "glm_moe_dsa": _usual(
        "GlmMoeDsaForCausalLM", "indexer.wq_b", "kv_b_proj", q_lora_rank=32, index_n_heads=4, index_head_dim=128,
        index_topk=8, unserved="sparse attention does not run on its CPU build", **_LATENT,
    ),
    "hunyuan_moe": _usual("HunYuanMoEV1ForCausalLM", "mlp.gate.wg", num_experts=4, moe_topk=2, head_dim=32),
    "jamba": _usual(
        "JambaForCausalLM", "mamba.in_proj", "mamba.dt_proj", "router",
        num_experts=4, num_experts_per_tok=2, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1,
        expert_layer_period=2, mamba_d_state=16, mamba_dt_rank=8,
        unserved="its CPU build does not run Mamba 1, not even in BF16",
    ),
    "llama4_text": _usual(
        "Llama4ForCausalLM", "feed_forward.router", config_name="Llama4TextConfig", intermediate_size_mlp=128,
        num_local_experts=4, num_experts_per_tok=1, head_dim=32, interleave_moe_layer_step=2,
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 16,
                              "num_heads": 8, "head_dim": 32, "expand": 2, "n_groups": 1, "chunk_size": 16},
    ),
    "mistral": _usual("MistralForCausalLM", head_dim=32),
    "mpt": Architecture(
        "MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
        unserved="not supported since vLLM 0.28",
    ),
    "nemotron": _usual("NemotronForCausalLM", head_dim=32),
    "opt": Architecture(
        "OPTForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 128, "ffn_dim": 128, "num_hidden_layers": 2,
                           "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 48},
        ("project_in", "project_out"),
    ),
    "ernie4_5_moe": _usual(
        "Ernie4_5_MoeForCausalLM", moe_intermediate_size=64, moe_num_experts=8, moe_k=2, moe_layer_start_index=1,
        moe_num_shared_experts=1,
    ),
    # Four streams, an input for each layer, and the last two layers read keys and values of the first two.
    "gemma3n_text": _usual(
        "Gemma3nForCausalLM", "altup.modality_router", config_name="Gemma3nTextConfig", head_dim=32,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=24, num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=32, laurel_rank=32, altup_num_inputs=4,
        intermediate_size=[256] * 4, activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4_text": _usual(
        "Gemma4ForCausalLM", head_dim=32, global_head_dim=64, num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=24, num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=32,
    ),
    "gemma4_moe": _usual(
        "Gemma4ForCausalLM", head_dim=32, global_head_dim=64, layer_types=["sliding_attention", "full_attention"],
        sliding_window=24, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=8, top_k_experts=2,
        moe_intermediate_size=64, attention_k_eq_v=True, num_global_key_value_heads=1,
    ),
    "gemma4_vision": Architecture(
        "Gemma4ForConditionalGeneration",
        {"text_config": {**_USUAL, "head_dim": 32, "global_head_dim": 64, "num_hidden_layers": 4,
                         "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24,
                         "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY,
                         "hidden_size_per_layer_input": 32},
         "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16,
                           "num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 4,
                           "position_embedding_size": 64},
         "audio_config": None, "image_token_id": 5, "boi_token_id": 6, "eoi_token_id": 7, "video_token_id": 8,
         "audio_token_id": 9},
        ("layers.2.self_attn.q_proj.linear",),
    ),
    "gemma3_vision": Architecture(
        "Gemma3ForConditionalGeneration",
        {"text_config": {**_USUAL, "head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 16},
         "vision_config": {**_VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
         "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7},
        ("vision_tower.encoder.layers.2.mlp.fc1",),
    ),
    "gpt_neox": _usual("GPTNeoXForCausalLM"),
    "granitemoe": _usual(
        "GraniteMoeForCausalLM", "block_sparse_moe.input_linear", num_local_experts=4, num_experts_per_tok=2
    ),
    "minimax_m2": _usual(
        "MiniMaxM2ForCausalLM", rotary_dim=16, scoring_func="softmax", use_routing_bias=True, num_local_experts=8,
        num_experts_per_tok=2, head_dim=32,
    ),
    "mistral3": Architecture(
        "Mistral3ForConditionalGeneration",
        {"text_config": {**_USUAL, "model_type": "mistral", "head_dim": 32},
         "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 32}, "image_token_index": 5},
        ("multi_modal_projector.linear_1",),
    ),
    "pixtral": Architecture(
        "LlavaForConditionalGeneration",
        {"text_config": {**_USUAL, "model_type": "mistral", "head_dim": 32},
         "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 16}, "image_token_index": 5,
         "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        ("multi_modal_projector.linear_1",),
    ),
    "nemotron_h": Architecture(
        "NemotronHForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 1,
         "ssm_state_size": 16, "chunk_size": 16, "layers_block_type": ["mamba", "mlp", "attention", "mlp"]},
    ),
    "qwen2_5_vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {**_USUAL, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6],
                                                       "rope_theta": 10000.0}},
         "vision_config": {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                           "out_hidden_size": 128, "fullatt_block_indexes": [2]},
         "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7},
        ("visual.blocks.2.attn.qkv", "visual.patch_embed.proj"),
    ),
    "exaone4": _usual("Exaone4ForCausalLM", sliding_window=24),
    "glm4_moe": _usual(
        "Glm4MoeForCausalLM", "mlp.gate", moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2,
        first_k_dense_replace=1, n_shared_experts=1, head_dim=32,
    ),
    "glm4_moe_lite": _usual("Glm4MoeLiteForCausalLM", "mlp.gate", "kv_b_proj", q_lora_rank=32, **_LATENT),
    "granite": _usual(
        "GraniteForCausalLM", embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0156,
        logits_scaling=8.0,
    ),
    "lfm2": _usual(
        "Lfm2ForCausalLM", "conv.conv", layer_types=["conv", "full_attention"], block_ff_dim=256, block_dim=128,
        conv_dim=128, conv_dim_out=128,
        block_auto_adjust_ff_dim=False,
    ),
    "olmo2": _usual("Olmo2ForCausalLM"),
    "olmo3": _usual("Olmo3ForCausalLM", sliding_window=24),
    "phi3": _usual("Phi3ForCausalLM"),
    "qwen2_moe": _usual(
        "Qwen2MoeForCausalLM", "shared_expert_gate", moe_intermediate_size=64, shared_expert_intermediate_size=64,
        num_experts=8, num_experts_per_tok=2,
    ),
    "qwen3_vl": Architecture(
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**_USUAL, "head_dim": 32, "rope_parameters": _MROPE}, "vision_config": _DEEPSTACK, **_VISUAL},
        ("visual.blocks.2.attn.qkv", "visual.deepstack_merger_list.0.linear_fc1"),
    ),
    "qwen3_vl_moe": Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        {"text_config": {**_USUAL, "head_dim": 32, "rope_parameters": _MROPE, "num_experts": 8,
                         "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True},
         "vision_config": _DEEPSTACK, **_VISUAL},
        ("visual.blocks.2.attn.qkv",),
    ),
    # The checkpoint has the rows of its convolution in three tensors.
    "olmo_hybrid": _usual(
        "OlmoHybridForCausalLM", layer_types=["linear_attention", "full_attention"], linear_num_key_heads=4,
        linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=64,
        unserved="its linear attention does not run on its CPU build",
    ),
    # The module around its layers has a parameter of its own.
    "llava_next": Architecture(
        "LlavaNextForConditionalGeneration",
        {"text_config": {**_USUAL, "model_type": "llama"}, "image_token_index": 5, "image_grid_pinpoints": [[28, 56]],
         "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
         "vision_feature_layer": -2},
        ("multi_modal_projector.linear_1",),
    ),
    # It asks on which device it is.
    "idefics3": Architecture(
        "Idefics3ForConditionalGeneration",
        {"text_config": {**_USUAL, "model_type": "llama"}, "vision_config": _VISION, "image_token_id": 5,
         "scale_factor": 2},
        ("connector.modality_projection.proj",),
    ),
    # Its rotary table is a weight.
    "roformer": _usual(
        "RoFormerForCausalLM", embedding_size=128, is_decoder=True, unserved="it does not know the architecture"
    ),
    "seed_oss": _usual("SeedOssForCausalLM", head_dim=32),
    "smollm3": _usual("SmolLM3ForCausalLM"),
    "qwen3_next": _usual(
        "Qwen3NextForCausalLM", "shared_expert_gate", moe_intermediate_size=64, shared_expert_intermediate_size=64,
        num_experts=8, num_experts_per_tok=2, head_dim=32, num_hidden_layers=4, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
    ),
}  # fmt: skip

#: What an architecture that cannot be had is refused with.
REFUSED: dict[str, tuple[Architecture, str]] = {
    "gpt2": (Architecture("GPT2LMHeadModel", _GPT), "no Linear that could be quantized"),
    "llama_classifier": (_usual("LlamaForSequenceClassification"), "has no output head"),
    "llama_base": (_usual("LlamaModel"), "has no output head"),
    "t5": (
        Architecture("T5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128,
                                                    "num_layers": 2, "num_heads": 4}),
        "has an encoder before its decoder",
    ),
    # Its attention and its MLPs are two lists.
    "xlm": (
        Architecture("XLMWithLMHeadModel", {"vocab_size": VOCABULARY, "emb_dim": 128, "n_layers": 2, "n_heads": 4,
                                            "max_position_embeddings": 256}),
        "runs between the layers of transformer.attentions",
    ),
    # Its layers share one block of attention.
    "zamba2": (
        Architecture(
            "Zamba2ForCausalLM",
            {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
             "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "num_attention_heads": 4,
             "attention_head_dim": 32, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3],
             "layers_block_type": ["mamba", "hybrid"] * 2, "adapter_rank": 8, "chunk_size": 16},
        ),
        "layers 1 and 3 share shared_transformer",
    ),
}  # fmt: skip


def make_architecture(directory: Path, architecture: Architecture) -> Path:
    """Random weights of a size that keeps activations alive, in BF16; with a tokenizer."""
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture.name)
    config_class = (
        getattr(transformers, architecture.config_name) if architecture.config_name else model_class.config_class
    )
    model = model_class(config_class(**architecture.config)).eval()
    generator = torch.Generator().manual_seed(1)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "norm" not in name:
                scale = 0.25 if parameter is embedding else parameter.shape[-1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.to(torch.bfloat16).save_pretrained(directory)
    if architecture.name in _TRANSPOSED:
        _transpose_experts(directory / "model.safetensors")
    tokenizer().save_pretrained(directory)
    return directory


# On the hub their stacks of experts are (experts, columns, rows), which transformers reads, but does not write.
_TRANSPOSED = {"Qwen3VLMoeForConditionalGeneration"}


def _transpose_experts(file: Path) -> None:
    tensors = load_file(file)
    stacks = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items() if ".experts." in name}
    assert stacks
    save_file({**tensors, **stacks}, file, {"format": "pt"})
