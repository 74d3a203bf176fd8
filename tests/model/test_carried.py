"""Decoders whose layers hand on more than a hidden state: what a row holds, and gradients through it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from prismaquant_ray.layout import BlockKind
from prismaquant_ray.model.capture import capture_activations
from prismaquant_ray.model.carried import Part
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests import architectures
from tests.architectures import VOCABULARY, WORKING, Architecture, make_architecture
from tests.model.test_models import streamed


def runner_of(directory: Path) -> ModelRunner:
    return ModelRunner(Checkpoint(Store(directory)), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "described", "width"),
    [
        # Streams, inputs of four layers, and key and value of two layers with two heads.
        (
            "gemma3n_text",
            "4 streams, 4 inputs of layers, 4 keys and values that later layers read",
            4 * 128 + 4 * 32 + 4 * 2 * 32,
        ),
        (
            "gemma4_text",
            "a hidden state, 4 inputs of layers, 4 keys and values that later layers read",
            128 + 4 * 32 + 2 * 2 * (32 + 64),
        ),
    ],
)
def test_gradients_are_those_of_the_whole_model(tmp_path: Path, name: str, described: str, width: int) -> None:
    """Of every Linear's output: also of keys that a later layer reads, and of the streams of which layers use one."""
    directory = make_architecture(tmp_path / name, WORKING[name])
    whole = getattr(transformers, WORKING[name].name).from_pretrained(directory, dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
    runner = runner_of(directory)
    layout = runner.layout
    assert (layout.row_width, runner.meta_model.carried.described) == (width, described)
    assert any(described in fact for fact in layout.facts)

    expected: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            output.retain_grad()
            expected[path] = output

        return hook

    wanted = {linear.name for linear in layout.linears()}
    for path, module in whole.named_modules():
        if path in wanted:
            module.register_forward_hook(keep(path))
    logits = whole(tokens).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    logits.backward(direction)

    inputs = {"input_ids": tokens}
    with torch.no_grad(), runner.entry():
        rows = [runner.embed(inputs)]
    assert rows[0].shape == (2, 16, width)
    blocks = layout.of(BlockKind.DECODER)
    for block in blocks[:-1]:
        with torch.no_grad():
            rows.append(runner.run_block(block.index, runner.load_block(block.index), rows[-1], inputs))
    found: dict[str, Tensor] = {}
    arriving = None
    for block, row in zip(reversed(blocks), reversed(rows), strict=True):
        row.requires_grad_()
        module = runner.load_block(block.index)
        with capture_activations(module, block) as captured:
            output = runner.run_block(block.index, module, row, inputs)
        if arriving is None:
            with runner.exit():
                (arriving,) = torch.autograd.grad(runner.logits(output), output, direction)
        gradients = torch.autograd.grad(output, [row, *captured.outputs.values()], arriving)
        arriving = gradients[0]
        found |= {
            f"{block.prefix}.{parameter.removesuffix('.weight')}": gradient
            for parameter, gradient in zip(captured.outputs, gradients[1:], strict=True)
        }
    assert found.keys() == wanted
    for path, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[path].grad, rtol=1e-4, atol=1e-6, msg=lambda m, p=path: f"{p}: {m}"
        )


class SkippingLayer(LlamaDecoderLayer):
    """Adds what it is given beside its hidden state."""

    def forward(self, hidden_states: Tensor, skipped: Tensor | None = None, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states if skipped is None else hidden_states + skipped, **kwargs)


class SkippingModel(LlamaModel):
    """Hands the embedding to every layer but the first."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(SkippingLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        hidden = embedded = self.embed_tokens(input_ids)
        tables = self.rotary_emb(hidden, torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0))
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, embedded if index else None, position_embeddings=tables)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class SkippingForCausalLM(LlamaForCausalLM):
    """A Llama whose later layers read the embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = SkippingModel(config)
        self.post_init()


def test_what_only_later_layers_read_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing a part of transformers has it put another module in its place, so there may be two.
    for module in (architectures.transformers, sys.modules["transformers"]):
        monkeypatch.setattr(module, "SkippingForCausalLM", SkippingForCausalLM, raising=False)
    sizes = {name: value for name, value in WORKING["apertus"].config.items() if name != "num_hidden_layers"}
    directory = make_architecture(
        tmp_path / "m",
        Architecture("SkippingForCausalLM", {**sizes, "num_hidden_layers": 3}, config_name="LlamaConfig"),
    )
    whole = SkippingForCausalLM.from_pretrained(directory, dtype=torch.float32)
    runner = runner_of(directory)
    carried = runner.meta_model.carried
    # The second and third layer read one tensor.
    assert carried is not None and carried.described == "a hidden state, 1 inputs of layers"
    assert runner.layout.row_width == 2 * 128
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(streamed(runner, tokens)[1], whole(tokens).logits)


def test_a_part_knows_which_axes_are_sequences_and_tokens() -> None:
    part = Part.between(torch.zeros(4, 2, 8, 5), torch.zeros(4, 3, 9, 5), ((2, 3), (8, 9)))
    assert part == Part((1, 2), (4, 5))
    tensor = torch.randn(4, 2, 8, 5)
    rows = part.flat(tensor, 2)
    assert rows.shape == (2, 8, part.width) == (2, 8, 20)
    assert torch.equal(part.whole(rows), tensor)
    assert torch.equal(rows[1, 7], tensor[:, 1, 7].flatten())
    alone = Part((0, 1), ())
    flags = torch.randn(2, 8)
    assert torch.equal(alone.whole(alone.flat(flags, 2)), flags) and alone.width == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((2, 8), (3, 8)),  # as many tokens as before
        ((2, 2, 8), (3, 3, 9)),  # two axes of sequences
        ((2, 8, 8), (3, 9, 9)),  # a row for each pair of tokens
        ((2, 8, 16), (3, 9, 24)),  # something else grows, too
    ],
)
def test_what_has_no_row_a_token_is_no_part(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert Part.between(torch.zeros(one), torch.zeros(other), ((2, 3), (8, 9))) is None
