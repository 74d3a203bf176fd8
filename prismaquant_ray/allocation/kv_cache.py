"""Memory per sequence when serving, from the model's configuration: KV cache and recurrent states.

The rules are vLLM's (`v1/kv_cache_interface.py` and `layers/mamba/mamba_utils.py` of 0.32): one page per layer, 2 ·
heads · head size elements per token, one latent vector under multi-head latent attention, a constant state in linear
attention. The margin covers the rest, which depends on vLLM's settings: the partly filled last block of a sequence, the
tokens of one prefill step beyond a window, and the padding of layer groups to one length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from prismaquant_ray.errors import InputError
from prismaquant_ray.layout import Layout
from prismaquant_ray.records import CacheType, ServerMemory

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_BYTES: dict[CacheType, int] = {"bf16": 2, "fp8": 1}
# vLLM's prefix cache, on by default, keeps the state before the current step beside the current one.
_STATES = 2
# A draft head speculates one token: one more state, and one more column of the convolution state.
_SPECULATIVE = 1
# Configuration keys that change the cache in ways not modelled here.
_UNKNOWN = ("num_kv_shared_layers", "global_head_dim", "index_head_dim", "attention_k_eq_v")


@dataclass(frozen=True, kw_only=True, slots=True)
class KvCache:
    """Layers by kind; bytes per token and attention layer, and per sequence and linear-attention layer.

    Sliding layers keep at most `window` tokens. Draft layers attend to the whole context, like full ones.
    """

    full_layers: int
    sliding_layers: int
    linear_layers: int
    draft_layers: int
    token_bytes: int  # one layer
    state_bytes: int  # one layer, one sequence
    window: int

    def parts(self, context: int, sequences: int) -> dict[str, int]:
        """Bytes by kind of layer, for `sequences` sequences of `context` tokens."""
        per_token = sequences * self.token_bytes
        return {
            "full_attention": per_token * context * self.full_layers,
            "sliding_attention": per_token * min(self.window, context) * self.sliding_layers,
            "linear_attention": sequences * self.state_bytes * self.linear_layers,
            "draft": per_token * context * self.draft_layers,
        }

    @property
    def attention_layers(self) -> int:
        """Layers with a cache that grows."""
        return self.full_layers + self.sliding_layers + self.draft_layers

    def in_fp8(self) -> KvCache:
        """The same in one byte an element instead of two; states of linear attention stay as they are."""
        return replace(self, token_bytes=self.token_bytes // 2)

    def total(self, context: int, sequences: int) -> int:
        """Bytes of all layers."""
        return sum(self.parts(context, sequences).values())


def kv_cache(text: Any, *, kv_cache: CacheType, draft_layers: int = 0) -> KvCache:
    """The cache from the text part of a transformers configuration.

    Raises:
        InputError: the model's cache is not understood; a budget in `bytes` or `bpp` still works.
    """
    for name in _UNKNOWN:
        if getattr(text, name, None):
            raise _unknown(f"{name} in its configuration")
    element = _BYTES[kv_cache]
    kinds = _layer_kinds(text)
    return KvCache(
        full_layers=kinds.count(_FULL),
        sliding_layers=kinds.count(_SLIDING),
        linear_layers=kinds.count(_LINEAR),
        draft_layers=draft_layers,
        token_bytes=element * _token_elements(text) if len(kinds) > kinds.count(_LINEAR) or draft_layers else 0,
        state_bytes=_state_bytes(text, _SPECULATIVE if draft_layers else 0) if _LINEAR in kinds else 0,
        window=_positive(text, "sliding_window") if _SLIDING in kinds else 0,
    )


def cache_stays(layout: Layout, reason: str) -> InputError:
    """The error of a model whose KV cache cannot be rounded."""
    return InputError(f"the KV cache of {layout.architecture} stays in 16 bits: {reason}; write kv_cache: bf16")


def check_rounded(layout: Layout, text: Any, drafts: int) -> None:
    """Raise InputError unless the keys and values of every layer that caches them can be rounded and scaled."""
    if layout.kept_cache is not None:
        raise cache_stays(layout, layout.kept_cache)
    layers = kv_cache(text, kv_cache="fp8", draft_layers=drafts).attention_layers
    if layers != len(layout.attention):
        raise cache_stays(
            layout, f"{layers} layers cache keys and values, and those of {len(layout.attention)} are seen when it runs"
        )


def draft_layers(text: Any, tensors: Iterable[str]) -> int:
    """Layers of the draft (MTP) head: declared in the configuration and there among the tensors."""
    declared = getattr(text, "mtp_num_hidden_layers", None) or getattr(text, "num_nextn_predict_layers", None) or 0
    behind = re.compile(rf"(^|\.)layers\.{text.num_hidden_layers}\.")
    return declared if any(name.startswith("mtp.") or behind.search(name) for name in tensors) else 0


def _layer_kinds(text: Any) -> list[str]:
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        # Without types every layer is alike, as in Mistral and Qwen2; the latter has a window that is off.
        windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
        kinds = [_SLIDING if windowed else _FULL] * _positive(text, "num_hidden_layers")
    strange = sorted(set(kinds) - {_FULL, _SLIDING, _LINEAR})
    if strange:
        raise _unknown(f"layers of type {strange[0]}")
    return list(kinds)


def _token_elements(text: Any) -> int:
    """Cached elements per token and layer."""
    if getattr(text, "kv_lora_rank", None):
        return _positive(text, "kv_lora_rank") + _positive(text, "qk_rope_head_dim")
    heads = _positive(text, "num_attention_heads")
    kv_heads = _positive(text, "num_key_value_heads") if getattr(text, "num_key_value_heads", None) else heads
    size = _positive(text, "head_dim") if getattr(text, "head_dim", None) else _positive(text, "hidden_size") // heads
    return 2 * kv_heads * size


def _state_bytes(text: Any, speculative: int) -> int:
    """State bytes of a gated delta net layer (Yang et al., arXiv 2412.06464): the last inputs of the convolution in
    16 bits, and one key × value matrix per head, in float32 unless the configuration has another type.
    """
    key_heads, key = _positive(text, "linear_num_key_heads"), _positive(text, "linear_key_head_dim")
    value_heads, value = _positive(text, "linear_num_value_heads"), _positive(text, "linear_value_head_dim")
    columns = _positive(text, "linear_conv_kernel_dim") - 1 + speculative
    matrix = 4 if str(getattr(text, "mamba_ssm_dtype", None) or "float32").endswith("float32") else 2
    state = 2 * columns * (2 * key_heads * key + value_heads * value) + matrix * value_heads * key * value
    return (_STATES + speculative) * state


def _positive(text: Any, name: str) -> int:
    value = getattr(text, name, None)
    if not isinstance(value, int) or value < 1:
        raise _unknown(f"{name} = {value!r} in its configuration")
    return value


def _unknown(what: str) -> InputError:
    return InputError(f"the KV cache of this model cannot be computed ({what}); give budget.bytes or budget.bpp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """A server's memory beside the weights: `cache` for `sequences` sequences of `context` tokens, and a margin.

    A `margin` that is a float is a share of the whole memory, an int bytes.
    """

    cache: KvCache
    context: int
    sequences: int
    margin: float | int

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.total(self.context, self.sequences)

    def room(self, memory: int) -> int:
        """Bytes of weights that fit into `memory`; negative when the cache alone does not."""
        margin = math.ceil(self.margin * memory) if isinstance(self.margin, float) else self.margin
        return memory - margin - self.cache_bytes

    def needed(self, weights: int) -> int:
        """The least memory, in bytes, that has room for `weights` bytes of weights."""
        held = weights + self.cache_bytes
        if not isinstance(self.margin, float):
            return held + self.margin
        memory = math.ceil(held / (1.0 - self.margin))
        return memory if self.room(memory) >= weights else memory + 1

    def memory(self, weights: int) -> ServerMemory:
        """The least memory that has room for `weights` bytes of weights, by part."""
        total, parts = self.needed(weights), self.cache.parts(self.context, self.sequences)
        return ServerMemory(
            total=total,
            weights=weights,
            kv_cache=self.cache_bytes,
            margin=total - weights - self.cache_bytes,
            kv_cache_of={kind: size for kind, size in parts.items() if size},
            context=self.context,
            sequences=self.sequences,
        )
