"""A tiny language model that has learned something: what is said of trained models does not hold of random ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.tiny import make_checkpoint, make_text

_STEPS, _BATCH, _LENGTH = 250, 16, 32


def make_trained(directory: Path) -> Path:
    """A Llama of two layers after seconds of training on pseudo-English prose; equal machines give equal bytes."""
    make_checkpoint(directory, "llama", hidden=32, intermediate=64, heads=2, kv_heads=1, head_dim=16)
    tokens = _tokens(directory)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=_STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        starts = torch.randint(len(tokens) - _LENGTH, (_BATCH, 1), generator=generator)
        batch = tokens[starts + torch.arange(_LENGTH)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss < 2.5, "it has learned nothing"
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def _tokens(directory: Path) -> Tensor:
    text = make_text(directory / "training", 60_000, seed=1).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(directory, model_max_length=10**9)
    return torch.tensor(tokenizer(text).input_ids)
