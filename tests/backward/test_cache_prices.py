"""Claims about the price of an FP8 KV cache, against a reference that is nothing but autograd and transformers' cache.

In the whole model an error is added to the keys and values that one layer caches, scaled by one number ε_t for each
token: k_t + ε_t · (Q(k_t) − k_t), and the same of v_t. Then p_t is ∂L/∂ε_t at ε = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from prismaquant_ray.backward.block import BlockBackward, HeadBackward
from prismaquant_ray.backward.loss import Loss, sample
from prismaquant_ray.backward.price import Split
from prismaquant_ray.block_records import BackwardRecord, CacheScales, ForwardRecord
from prismaquant_ray.cache_rounding import cache_scale, round_cached
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.formats import FormatName
from prismaquant_ray.forward.block import BlockForward
from prismaquant_ray.forward.encode import Rounding
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.tiny import make_checkpoint, random_tokens
from tests.tiny_families import make_family

SEED = 7
FORMATS = (FormatName.MXFP8, FormatName.BF16)


@dataclass
class Passed:
    """The records of both passes over a tiny model, by block."""

    runner: ModelRunner
    calibration: CalibrationSet
    forward: dict[int, ForwardRecord] = field(default_factory=dict)
    backward: dict[int, BackwardRecord] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: Path) -> Passed:
        runner = ModelRunner(Checkpoint(Store(directory)), dtype=torch.float32, device=torch.device("cpu"))
        tokens = random_tokens(4, 16, seed=3)
        passed = cls(runner, CalibrationSet(tokens=tokens, holdout=torch.tensor([False, False, False, True])))
        passed.run()
        return passed

    def run(self) -> None:
        runner, batches = self.runner, self.calibration.batches(2)
        decoder, drafts = (runner.layout.of(kind) for kind in (BlockKind.DECODER, BlockKind.DRAFT))
        tensors: dict[int, Any] = {}
        entering: dict[int, list[Tensor]] = {}

        def forward(index: int, hidden: list[Tensor]) -> list[Tensor]:
            block = BlockForward(runner, index, FORMATS, Rounding())
            entering[index] = hidden
            hidden = [block.run(x, batch) for x, batch in zip(hidden, batches, strict=True)]
            made = block.finish()
            tensors[index], self.forward[index] = made.tensors, made.record
            return hidden

        with torch.no_grad(), runner.entry():
            hidden = [runner.embed(batch.inputs) for batch in batches]
        for block in decoder:
            hidden = forward(block.index, hidden)
        for block in drafts:
            with runner.beside(block.index):
                forward(block.index, hidden)
        loss = Loss(labels="sampled", seed=SEED, vocab_size=runner.layout.vocab_size)
        with runner.exit():
            gradients = [loss.gradient(runner.logits, x, b)[0] for x, b in zip(hidden, batches, strict=True)]
        for block in reversed(decoder):
            made = self.forward[block.index].cache
            priced = BlockBackward(runner, block.index, FORMATS, tensors[block.index], (), made)
            for m, (x, batch) in enumerate(zip(entering[block.index], batches, strict=True)):
                priced.forward(x, batch)
                gradients[m] = priced.backward(gradients[m], batch)
            self.backward[block.index] = priced.finish(Split.of(self.calibration))
        for block in drafts:
            with runner.beside(block.index):
                made = self.forward[block.index].cache
                head = HeadBackward(runner, block.index, FORMATS, tensors[block.index], loss, (), made)
                for x, batch in zip(entering[block.index], batches, strict=True):
                    head.run(x, batch)
                self.backward[block.index] = head.finish(Split.of(self.calibration))


class Erring(DynamicCache):
    """transformers' own cache, in which one layer's entries carry ε-scaled errors."""

    def __init__(self, config: Any, layer: int, scales: CacheScales, epsilon: Tensor) -> None:
        super().__init__(config=config)
        self.erring, self.scales, self.epsilon = layer, scales, epsilon
        self.largest = (0.0, 0.0)

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer == self.erring:
            self.largest = (float(key.abs().max()), float(value.abs().max()))
            key = key + self._error(key, self.scales.key)
            value = value + self._error(value, self.scales.value)
        return super().update(key, value, layer, *args, **kwargs)

    def _error(self, x: Tensor, scale: float) -> Tensor:
        x = x.detach()
        rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return self.epsilon.view(len(x), 1, -1, 1) * (rounded - x)


def labels(logits: Tensor) -> Tensor:
    found = []
    for row, own in enumerate(logits.detach()):
        uniform = torch.from_numpy(np.random.default_rng((SEED, row)).random(len(own)))
        found.append(sample(torch.softmax(own, -1), uniform))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5_text"])
def test_a_cache_costs_half_the_squared_derivative_by_the_size_of_each_tokens_error(tmp_path: Path, name: str) -> None:
    make = make_family if name.startswith("qwen3_5") else make_checkpoint
    directory = make(tmp_path / "model", name)
    passed = Passed.of(directory)
    layout, tokens = passed.runner.layout, passed.calibration.tokens
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(model.model.layers)
    seen = 0
    for layer, (block, kind) in enumerate(zip(layout.of(BlockKind.DECODER), kinds, strict=True)):
        if kind == "linear_attention":
            assert block.attention == ()
            assert passed.forward[block.index].cache == passed.backward[block.index].cache == {}
            continue
        (attention,) = block.attention
        assert attention.name == f"{block.prefix}.self_attn"
        scales, price = (found[block.index].cache[attention.name] for found in (passed.forward, passed.backward))
        epsilon = torch.zeros(tokens.numel(), requires_grad=True)
        cache = Erring(model.config, layer, scales, epsilon)
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels(logits), reduction="sum")
        (p,) = torch.autograd.grad(loss, epsilon)
        assert price.cost == pytest.approx(float(p.double().square().sum()) / 2 / tokens.numel(), rel=2e-3)
        assert price.cost > 0
        assert price.standard_error > 0
        assert price.key_cost > 0
        assert price.value_cost > 0
        assert (scales.key_amax, scales.value_amax) == pytest.approx(cache.largest, rel=1e-5)
        seen += 1
    assert seen
    for block in layout.of(BlockKind.DRAFT):
        assert [each.name for each in block.attention] == ["mtp.layers.0.self_attn"]
        assert passed.backward[block.index].cache["mtp.layers.0.self_attn"].cost > 0


def test_rounding_is_that_of_compressed_tensors() -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) * 3
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False)
    scale = cache_scale(float(x.abs().max()))
    zero = torch.zeros(1)
    expected = fake_quantize(x, torch.tensor([scale]), zero, args)
    assert torch.equal(round_cached(x, scale), expected)
    # Beyond the largest code values saturate, and are not NaN.
    assert torch.equal(round_cached(1e6 * x, scale).abs().max(), torch.tensor(448 * scale))


@pytest.mark.parametrize("amax", [1e-3, 0.7, 3.0, 448.0, 1234.5])
def test_a_scale_is_the_smallest_bf16_number_with_room_for_twice_the_largest_value(amax: float) -> None:
    scale = cache_scale(amax)
    assert float(torch.tensor(scale).bfloat16()) == scale
    below = torch.tensor(scale).bfloat16().view(torch.int16).sub(1).view(torch.bfloat16)
    assert scale >= 2 * amax / 448 > float(below)
    assert cache_scale(0.0) == 1.0
