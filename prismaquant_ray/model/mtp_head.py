"""The multi-token-prediction head: a decoder layer that predicts one token further, for speculative decoding.

transformers drops it, so it is built from the model's own layers. From the final hidden state h_t and the embedding of
token t+1 it predicts token t+2: norm(layer(fc[norm(embed_{t+1}); norm(h_t)])), then the model's own head. Source:
DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), section 2.2; the order of the halves is vLLM's
`qwen3_5_mtp.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.model.meta_model import Inputs, MetaModel


def is_draft(tensors: Container[str], prefix: str) -> bool:
    """Whether a checkpoint holds a head of this form below a prefix."""
    return f"{prefix}.fc.weight" in tensors


class DraftHead(nn.Module):
    """On the meta device, with the checkpoint's names; weights are the caller's to load."""

    def __init__(self, meta_model: MetaModel) -> None:
        super().__init__()
        self.place = attention_layer(meta_model)
        norm = meta_model.final_norm
        width = meta_model.model.get_input_embeddings().weight.shape[1]
        with torch.device("meta"):
            self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([meta_model.new_layer(self.place)])
        self.norm = copy.deepcopy(norm)
        self.pre_fc_norm_embedding = copy.deepcopy(norm)
        self.pre_fc_norm_hidden = copy.deepcopy(norm)

    def run(self, meta_model: MetaModel, hidden: Tensor, inputs: Inputs) -> Tensor:
        """The input of the output head, (sequences, tokens - 1, H), for the last decoder layer's output `hidden`.

        The embedding and the final norm must be loaded. The last token has no successor and is left out.
        """
        tokens = inputs["input_ids"]
        following = {"input_ids": tokens[:, :-1]}
        embedded = meta_model.model.get_input_embeddings()(tokens[:, 1:])
        state = meta_model.normed(hidden)[:, :-1]
        entering = self.fc(torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(state)], dim=-1))
        output: Tensor = self.norm(meta_model.run_layer(self.place, self.layers[0], entering, following))
        return output


def attention_layer(meta_model: MetaModel) -> int:
    """The index of the first decoder layer with full attention, the kind that draft layers are."""
    config: Any = meta_model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(meta_model.layers)
    if "full_attention" not in kinds:
        raise InputError(
            f"{type(meta_model.model).__name__} has no layer with full attention to build its draft head of"
        )
    return int(kinds.index("full_attention"))


def most_likely(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, at_once: int) -> Tensor:
    """The most likely token (sequences, tokens) for hidden (sequences, tokens, H), from `at_once` logits at a time."""
    step = max(1, at_once // len(hidden))
    return torch.cat([logits_of(piece).argmax(-1) for piece in hidden.split(step, dim=1)], dim=1)
