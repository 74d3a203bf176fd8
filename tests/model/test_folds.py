"""Folds of blocks: found in every architecture, none that is not there, and the function stays what it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prismaquant_ray.factors import Equalization, expanded, pooled
from prismaquant_ray.fold import Fold, FoldMember
from prismaquant_ray.forward.equalize import representable
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.model.folds import folds_of
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.folded import FoldedSource
from prismaquant_ray.storage.store import Store
from tests.architectures import WORKING, make_architecture
from tests.tiny_families import FAMILIES


def equalizable(runner: ModelRunner, tokens: Tensor) -> tuple[dict[int, tuple[Fold, ...]], set[str]]:
    """The folds of every decoder layer, and the parameters of Linears whose columns are in none."""
    found: dict[int, tuple[Fold, ...]] = {}
    left: set[str] = set()
    inputs = {"input_ids": tokens}
    with torch.no_grad():
        with runner.entry():
            hidden = runner.embed(inputs)
        for block in runner.layout.of(BlockKind.DECODER):
            module = runner.load_block(block.index)
            found[block.index] = runner.folds(block.index, module, hidden, inputs)
            multiplied = {member.parameter for fold in found[block.index] for member in fold.multiplied}
            names = {name for group in block.groups for each in group.matrices for name in each.parameters}
            left |= names - multiplied
            hidden = runner.run_block(block.index, module, hidden, inputs)
    return found, left


def equalization_of(runner: ModelRunner, folds: Mapping[int, tuple[Fold, ...]]) -> dict[int, Equalization]:
    """Powers of two for all of them, which BF16 multiplies by exactly; what norms of 1 + w can store is near."""
    generator = torch.Generator().manual_seed(0)
    found: dict[int, Equalization] = {}
    for index, of_block in folds.items():
        module, stored = runner.load_block(index), runner.stored_types(index)
        chosen = []
        for fold in of_block:
            s = torch.exp2(torch.randint(-3, 4, shape(fold), generator=generator).float())
            for member in fold.divided:
                if member.shift:
                    weight = module.get_parameter(member.parameter)
                    s = representable(weight, s, stored[member.parameter], member.shift)
            chosen.append((fold, s))
        found[index] = chosen
    return found


def shape(fold: Fold) -> tuple[int, ...]:
    return (fold.channels,) if fold.experts is None else (fold.experts, fold.channels)


def check_function(directory: Path) -> dict[int, tuple[Fold, ...]]:
    """Logits of a checkpoint with factors in all its folds are those without; the folds."""
    source = Checkpoint(Store(directory))
    runner = ModelRunner(source, dtype=torch.float32, device=torch.device("cpu"))
    tokens = torch.randint(10, 200, (2, 12), generator=torch.Generator().manual_seed(5))
    folds, _ = equalizable(runner, tokens)
    equalization = equalization_of(runner, folds)
    folded = FoldedSource(source, [(runner.layout.blocks[index], each) for index, each in equalization.items()])
    again = ModelRunner(folded, dtype=torch.float32, device=torch.device("cpu"))
    expected, found = logits(runner, tokens), logits(again, tokens)
    # A norm that multiplies by 1 + w stores what it can; nothing else is rounded.
    shifted = any(member.shift for each in folds.values() for fold in each for member in fold.divided)
    largest = float((found - expected).abs().max() / expected.abs().max())
    assert largest < (5e-2 if shifted else 1e-5), largest
    return folds


@torch.no_grad()
def logits(runner: ModelRunner, tokens: Tensor) -> Tensor:
    inputs = {"input_ids": tokens}
    with runner.entry():
        hidden = runner.embed(inputs)
    for block in runner.layout.of(BlockKind.DECODER):
        hidden = runner.run_block(block.index, runner.load_block(block.index), hidden, inputs)
    with runner.exit():
        return runner.logits(hidden)


@pytest.mark.parametrize("name", WORKING)
def test_every_architecture_stays_what_it_is(name: str, tmp_path: Path) -> None:
    folds = check_function(make_architecture(tmp_path / name, WORKING[name]))
    # Its norms are behind what they norm, and read by the residual, too.
    assert all(folds.values()) is (name != "roformer")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_what_it_is(families: Mapping[str, Path], family: str) -> None:
    assert all(check_function(families[family]).values())


class Gated(nn.Module):
    """A norm, gate, up and down; `beside` is what else is done to what goes through."""

    def __init__(self, beside: str = "") -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate_proj, self.up_proj = nn.Linear(16, 32, bias=False), nn.Linear(16, 32)
        self.down_proj = nn.Linear(32, 16, bias=False)
        self.scale = nn.Parameter(torch.randn(16))
        self.beside = beside
        with torch.no_grad():
            self.norm.weight.copy_(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        up = self.up_proj(normed)
        if self.beside == "clamp":
            up = up.clamp(-1, 1)
        inner = torch.nn.functional.silu(self.gate_proj(normed)) * up
        if self.beside == "reader":
            return x + self.down_proj(inner) + normed * self.scale
        return x + self.down_proj(inner)


def found(module: nn.Module) -> tuple[Fold, ...]:
    torch.manual_seed(1)
    return folds_of(module.requires_grad_(False), torch.randn(2, 8, 16), module)


def test_a_gated_mlp_has_two() -> None:
    torch.manual_seed(0)
    up, norm = found(Gated())
    assert norm.channels == 16 and up.channels == 32 and up.experts is None
    assert [member.parameter for member in up.divided] == ["up_proj.weight", "up_proj.bias"]
    assert [member.parameter for member in up.multiplied] == ["down_proj.weight"]
    assert [member.parameter for member in norm.divided] == ["norm.weight"]
    assert sorted(member.parameter for member in norm.multiplied) == ["gate_proj.weight", "up_proj.weight"]


def test_a_clamp_between_them_is_found() -> None:
    torch.manual_seed(0)
    (norm,) = found(Gated("clamp"))
    assert norm.divided[0].parameter == "norm.weight"


def test_a_reader_that_nobody_saw_is_found() -> None:
    torch.manual_seed(0)
    (up,) = found(Gated("reader"))
    assert up.multiplied[0].parameter == "down_proj.weight"


def test_a_channel_that_drowns_the_others_hides_nothing() -> None:
    """What reads as rounding beside an activation of thousands, as real models have them, is none."""
    torch.manual_seed(0)
    module = Gated("reader")
    with torch.no_grad():
        module.down_proj.weight[3] *= 1e8
    (up,) = found(module)
    assert up.multiplied[0].parameter == "down_proj.weight"


def test_the_weights_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    module = Gated()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_heads_of_values_are_repeated_as_attention_repeats_them() -> None:
    member = FoldMember(parameter="o_proj.weight", axis=-1, repeats=3, width=2)
    along = expanded(member, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert along.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert pooled(member, along).tolist() == [1, 2, 3, 4]
