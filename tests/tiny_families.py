"""Tiny random checkpoints of mixture-of-experts, hybrid and vision-language families, laid out as on the hub.

Architecture, tensor names, dtypes and files are the real ones; only the sizes and the weights are made up. Like those
of `tiny.py`, rows differ in scale, nothing is trivial, and logits have a standard deviation of about two. Routers are
fitted to what reaches them: they use all experts, some more than others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLProcessor,
)
from transformers.processing_utils import ProcessorMixin

from tests.tiny import LOGIT_STD, VOCABULARY, random_tokens, tokenizer

# family: (config class, model class)
_CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v3_fp8": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
    "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
}
FAMILIES = tuple(_CLASSES)
VISION_FAMILIES = ("qwen3_5", "qwen3_5_moe")

COLD_EXPERT = 5  # of every layer of qwen3_moe: hardly a token goes there
FP8_BLOCK = 128
FP8_MAX = 448.0

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (VOCABULARY + index for index in range(len(VISION_TOKENS)))
VISION_VOCABULARY = 352  # more rows than tokens, as on the hub

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)

_EMBEDDING_STD = 0.25
_COMMON = 0.4  # how long the embeddings' shared direction is, in units of their spread


def make_family(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    shards: int = 1,
    packed_mtp: bool = True,
    vision_config: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of `family` with its tokenizer into `directory`; equal arguments give equal bytes.

    `overrides` go to the configuration class, of a vision-language family to that of its text model. `packed_mtp=False`
    stores the experts of a multi-token-prediction layer one by one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config_class, model_class = _CLASSES[family]
    config = config_class(**_arguments(family, vision_config or {}, overrides))
    config.architectures = [model_class.__name__]
    model = model_class(config).eval()
    state = _draw(model, family, seed)
    if family in VISION_FAMILIES and config.text_config.mtp_num_hidden_layers:
        state |= _draw_mtp(state, config.text_config, seed, packed_mtp)
    state = _as_on_the_hub(state, family)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = "bfloat16"
    if family == "deepseek_v3_fp8":
        state = _in_fp8_blocks(state)
    _save(state, directory, shards)
    config.save_pretrained(directory)
    if family == "deepseek_v3_fp8":
        _declare_fp8(directory)
    model.generation_config.save_pretrained(directory)
    _hub_tokenizer(family).save_pretrained(directory)
    if family in VISION_FAMILIES:
        _save_processor(directory, config.vision_config)
    return directory


def dequantize_blocks(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """The F32 weight a block-scaled FP8 one stands for."""
    rows, columns = weight.shape
    scales = scale_inv.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return weight.float() * scales


# ---------------------------------------------------------------------------------------------- configurations


def _arguments(family: str, vision: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if family in VISION_FAMILIES:
        text = common | _OWN[f"{family}_text"] | {"vocab_size": VISION_VOCABULARY, "mtp_num_hidden_layers": 1}
        text |= {"mtp_use_dedicated_embeddings": False} | overrides
        return {
            "text_config": text,
            "vision_config": _VISION | {"out_hidden_size": text["hidden_size"]} | vision,
            "image_token_id": IMAGE_PAD,
            "video_token_id": VIDEO_PAD,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "tie_word_embeddings": text["tie_word_embeddings"],
        }
    assert not vision, f"{family} has no vision tower"
    return common | _OWN[family.removesuffix("_fp8")] | overrides


_QWEN3_5 = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 4,
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_hidden_layers": 2,
        "head_dim": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {
        "num_hidden_layers": 2,
        "head_dim": 64,
        "intermediate_size": 160,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "hidden_size": 192,
        "intermediate_size": 320,
        "moe_intermediate_size": 96,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
    "qwen3_5_text": _QWEN3_5 | {"intermediate_size": 256},
    "qwen3_5_moe_text": _QWEN3_5
    | {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {
        "num_hidden_layers": 2,
        "head_dim": 64,
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
}
_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [],
}


# ---------------------------------------------------------------------------------------------- weights


def _draw(model: PreTrainedModel, family: str, seed: int) -> dict[str, Tensor]:
    """Every persistent tensor of `model`, in F32, under transformers' names; final norm fitted to `LOGIT_STD`."""
    draw = _Draw(seed, model.config.get_text_config().hidden_size, family)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(draw(name, tensor.shape))

        def draw_router(router: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            router.weight.copy_(draw.router(len(router.weight), inputs[0].flatten(0, -2)))

        hooks = [
            module.register_forward_pre_hook(draw_router)
            for name, module in model.named_modules()
            if re.search(r"mlp\.(gate|router)$", name)
        ]
        model(random_tokens(8, 64))
        for hook in hooks:
            hook.remove()
        norm = next(module for name, module in model.named_modules() if re.fullmatch(_FINAL_NORM, name)).weight
        # Qwen3.5's norms multiply by 1 + weight.
        offset = 1.0 if family.startswith("qwen3_5") else 0.0
        std = model(random_tokens(4, 64)).logits.float().std()
        norm.copy_((norm + offset) * (LOGIT_STD / std) - offset)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


_FINAL_NORM = r"model(\.language_model)?\.norm"


def _draw_mtp(state: dict[str, Tensor], config: Any, seed: int, packed: bool) -> dict[str, Tensor]:
    """The multi-token-prediction layer, which transformers leaves out: a full-attention layer and its inlet."""
    hidden = config.hidden_size
    model = "model.language_model"
    body = f"{model}.layers.{config.layer_types.index('full_attention')}."
    shapes = {
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
    }
    for layer in range(config.mtp_num_hidden_layers):
        for name, tensor in state.items():
            if name.startswith(body):
                shapes[f"mtp.layers.{layer}.{name.removeprefix(body)}"] = tuple(tensor.shape)
    draw = _Draw(seed + 1, hidden, "mtp")
    mtp = {name: draw(name, shape) for name, shape in shapes.items()}
    mtp["mtp.norm.weight"] = (1 + state[f"{model}.norm.weight"]) * (1 + 0.1 * draw.normal(hidden)) - 1
    return mtp if packed else _one_by_one(mtp, ("gate_proj", "up_proj", "down_proj"))


class _Draw:
    """Random tensors by what their names say they are."""

    def __init__(self, seed: int, hidden: int, family: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.family = family
        self.transposed = family == "gpt_oss"
        self.common = self.normal(hidden)  # the direction all embeddings share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        for pattern, rule in _RULES:
            if re.search(pattern, name):
                return rule(self, shape)
        if len(shape) == 1:
            centre = 0.0 if self._adds_one(name) else 1.0
            return centre + 0.2 * self.normal(*shape)
        return self.matrix(shape)

    def matrix(self, shape: tuple[int, ...], gain: float = 1.0) -> Tensor:
        columns = math.prod(shape[1:])
        row_scale = torch.exp(0.3 * self.normal(shape[0])).reshape(-1, *[1] * (len(shape) - 1))
        return gain * row_scale * self.normal(*shape) / columns**0.5

    def experts(self, shape: tuple[int, ...]) -> Tensor:
        """Matrices (experts, out, in), or of GPT-OSS (experts, in, out); experts differ in size."""
        experts, rows, columns = shape if not self.transposed else (shape[0], shape[2], shape[1])
        stack = torch.stack([self.matrix((rows, columns)) for _ in range(experts)])
        stack *= torch.exp(0.2 * self.normal(experts, 1, 1))
        return stack.transpose(1, 2) if self.transposed else stack

    def router(self, experts: int, inputs: Tensor) -> Tensor:
        """Scores of standard deviation one about a mean that differs from expert to expert."""
        middle = inputs.mean(0)
        matrix = self.matrix((experts, len(middle)))
        matrix -= torch.outer(matrix @ middle, middle) / middle.square().sum()
        matrix /= (inputs @ matrix.T).std(0)[:, None]
        leaning = 0.5 * self.normal(experts)
        if self.family == "qwen3_moe":
            leaning[COLD_EXPERT] = -1.8
        return matrix + torch.outer(leaning, middle) / middle.square().sum()

    def embedding(self, shape: tuple[int, ...]) -> Tensor:
        return _EMBEDDING_STD * (self.normal(*shape) + _COMMON * self.common)

    def short_convolution(self, shape: tuple[int, ...]) -> Tensor:
        kernel = 0.3 * self.normal(*shape)
        kernel[..., -1] += 1.0
        return kernel

    def _adds_one(self, name: str) -> bool:
        """Whether this norm multiplies by 1 + weight."""
        own = "visual" in name or name.endswith("linear_attn.norm.weight")
        return self.family.startswith(("qwen3_5", "mtp")) and not own


_RULES: tuple[tuple[str, Callable[[_Draw, tuple[int, ...]], Tensor]], ...] = (
    # Half-lives from one token to some dozens.
    (r"A_log$", lambda draw, shape: -1.0 + 0.7 * draw.normal(*shape)),
    (r"dt_bias$", lambda draw, shape: -1.0 + 0.5 * draw.normal(*shape)),
    (r"conv1d\.weight$", _Draw.short_convolution),
    (r"linear_attn\.in_proj_a\.weight$", lambda draw, shape: draw.matrix(shape, 0.5)),
    (r"e_score_correction_bias$", lambda draw, shape: 0.1 * draw.normal(*shape)),
    (r"sinks$", lambda draw, shape: draw.normal(*shape)),
    (r"experts\.(gate_up|down)_proj$", _Draw.experts),
    (r"embed_tokens\.weight$", _Draw.embedding),
    (r"lm_head\.weight$|pos_embed\.weight$", lambda draw, shape: _EMBEDDING_STD * draw.normal(*shape)),
    (r"bias$", lambda draw, shape: 0.3 * draw.normal(*shape)),
)


# ---------------------------------------------------------------------------------------------- layout


def _as_on_the_hub(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The hub's names, dtypes and split of the experts."""
    if family == "mixtral":
        state = _one_by_one(state, ("w1", "w3", "w2"))
        state = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in state.items()}
    elif family == "qwen3_moe" or family.startswith("deepseek_v3"):
        state = _one_by_one(state, ("gate_proj", "up_proj", "down_proj"))
    return {
        name: tensor.contiguous().to(torch.float32 if re.search(_KEPT_IN_F32, name) else torch.bfloat16)
        for name, tensor in state.items()
    }


_KEPT_IN_F32 = r"e_score_correction_bias$|linear_attn\.A_log$|linear_attn\.norm\.weight$"


def _one_by_one(state: dict[str, Tensor], names: tuple[str, str, str]) -> dict[str, Tensor]:
    """Packed experts taken apart, with `names` for gate, up and down."""
    gate, up, down = names
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, weight in enumerate(tensor):
                apart[f"{stem}.{expert}.{gate}.weight"], apart[f"{stem}.{expert}.{up}.weight"] = weight.chunk(2)
        elif last == "down_proj":
            for expert, weight in enumerate(tensor):
                apart[f"{stem}.{expert}.{down}.weight"] = weight
        else:
            apart[name] = tensor
    return apart


def _in_fp8_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every Linear of the decoder layers as E4M3 with one scale for 128 × 128 weights."""
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if re.search(r"\.layers\..*_proj(_with_mqa)?\.weight$", name):
            stored[name], stored[f"{name}_scale_inv"] = _quantize_blocks(tensor.float())
        else:
            stored[name] = tensor
    return stored


def _quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    scales = blocks.abs().amax((1, 3)) / FP8_MAX
    quantized = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return quantized.to(torch.float8_e4m3fn).contiguous(), scales


def _declare_fp8(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save(state: dict[str, Tensor], directory: Path, shards: int) -> None:
    if shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    places: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: state[name] for name in part}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _hub_tokenizer(family: str) -> PreTrainedTokenizerFast:
    plain = tokenizer()
    if not family.startswith("qwen3_5"):
        return plain
    sees = family in VISION_FAMILIES
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    if sees:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in VISION_TOKENS])
        assert backend.token_to_id(VISION_TOKENS[-1]) == VIDEO_PAD
    roles = ("vision_bos_token", "vision_eos_token", "image_token", "video_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=plain.pad_token,
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        unk_token=plain.eos_token,  # else Qwen's own tokenizer class adds <|endoftext|> to the vocabulary
        extra_special_tokens=dict(zip(roles, VISION_TOKENS, strict=True)) if sees else {},
        model_max_length=plain.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _save_processor(directory: Path, vision: Any) -> None:
    """The image and video processors' files as on the hub; at most 16 merged patches an image."""
    pixels = (vision.patch_size * vision.spatial_merge_size) ** 2
    shared = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {
        "size": {"shortest_edge": pixels, "longest_edge": 16 * pixels},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    video = {
        "size": {"shortest_edge": 2 * pixels, "longest_edge": 32 * pixels},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    for name, own in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (directory / name).write_text(json.dumps(shared | own, indent=2) + "\n")


class ImagesOnlyProcessor(Qwen3VLProcessor):
    """The processor without its video processor, which needs torchvision: `from_pretrained(directory)`."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = tokenizer.image_token, tokenizer.video_token
        self.image_token_id, self.video_token_id = IMAGE_PAD, VIDEO_PAD
        self.vision_start_token, self.vision_end_token = VISION_TOKENS[:2]
        self.vision_start_token_id, self.vision_end_token_id = VISION_START, VISION_END
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
