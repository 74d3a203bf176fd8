"""Claims about factors: the search finds the best of what it tries, and what is stored is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prismaquant_ray.factors import Factors, factors_of
from prismaquant_ray.fold import Fold, FoldMember
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.forward.equalize import Reading, chosen_factors, judged_by, representable
from prismaquant_ray.forward.kept_rows import OF_SEQUENCE, ROWS, KeptRows
from prismaquant_ray.forward.statistics import divided
from tests.reference import equalize as reference

NVFP4 = FORMATS[FormatName.NVFP4]
NORM = Fold(
    channels=32,
    divided=(FoldMember(parameter="norm.weight", axis=-1),),
    multiplied=(FoldMember(parameter="q.weight", axis=-1),),
)


def drawn(seed: int, spread: float, channels: int = 32) -> tuple[Tensor, Tensor]:
    """Rows of an input whose channels differ in size, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(channels, generator=generator))
    return torch.randn(24, channels, generator=generator) * size, torch.randn(20, channels, generator=generator)


def reading_of(rows: Tensor, *weights: Tensor) -> Reading:
    return Reading(
        importance=rows.square().mean(0, keepdim=True),
        amax=rows.abs().amax(0, keepdim=True),
        rows=rows,
        expert=torch.zeros(len(rows), dtype=torch.int64),
        weights=weights,
    )


@pytest.mark.parametrize(("seed", "spread"), [(0, 0.0), (1, 0.5), (2, 1.5), (3, 3.0)])
def test_the_best_of_all_that_are_tried(seed: int, spread: float) -> None:
    rows, weight = drawn(seed, spread)
    reading = reading_of(rows, weight)
    tried = reference.candidates(reading.importance[0], weight)
    errors = [reference.error(rows, reading.importance[0], reading.amax[0], weight, s) for s in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    s = chosen_factors(NORM, reading, NVFP4, powers_of_two=False)
    assert (s is None) is (best == 0)
    if s is not None:
        torch.testing.assert_close(s, tried[best], rtol=1e-5, atol=0)
        # What it is for: one large channel no longer takes the bits of its neighbours.
        assert errors[best] < 0.8 * errors[0] or spread < 1


def test_experts_with_factors_of_their_own_have_those_that_each_would_have_alone() -> None:
    parts = [drawn(seed, 1.5) for seed in (4, 5)]
    fold = replace(NORM, experts=2)
    both = Reading(
        importance=torch.stack([rows.square().mean(0) for rows, _ in parts]),
        amax=torch.stack([rows.abs().amax(0) for rows, _ in parts]),
        rows=torch.cat([rows for rows, _ in parts]),
        expert=torch.tensor([0] * 24 + [1] * 24),
        weights=[torch.stack([weight for _, weight in parts])],
    )
    together = chosen_factors(fold, both, NVFP4, powers_of_two=False)
    assert together is not None
    for s, (rows, weight) in zip(together, parts, strict=True):
        tried = reference.candidates(rows.square().mean(0), weight)
        assert any(torch.allclose(s, each, rtol=1e-5) for each in tried[1:])


def test_powers_of_two_are() -> None:
    rows, weight = drawn(6, 2.0)
    s = chosen_factors(NORM, reading_of(rows, weight), NVFP4, powers_of_two=True)
    assert s is not None
    assert torch.equal(torch.exp2(torch.log2(s).round()), s)


def test_a_channel_that_is_never_used_keeps_its_factor() -> None:
    rows, weight = drawn(7, 2.0)
    rows[:, 3] = 0
    weight[:, 5] = 0
    s = chosen_factors(NORM, reading_of(rows, weight), NVFP4, powers_of_two=False)
    assert s is not None
    assert s[3] == s[5] == 1
    assert torch.isfinite(s).all() and (s > 0).all()


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8),
    st.lists(st.floats(1 / 64, 64, width=32), min_size=8, max_size=8),
    st.sampled_from([0.0, 1.0]),
)
def test_a_norm_stores_exactly_what_its_readers_are_multiplied_by(
    weights: list[float], wanted: list[float], shift: float
) -> None:
    weight = torch.tensor(weights).bfloat16().float()
    s = representable(weight, torch.tensor(wanted), torch.bfloat16, shift)
    assert torch.isfinite(s).all() and (s > 0).all()
    stored = Factors(columns=1 / s, shift=shift).apply(weight, torch.bfloat16)
    # γ' s is γ, to the last places of float32.
    torch.testing.assert_close((stored + shift) * s, weight + shift, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**31))
def test_factors_undo_what_they_apply(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 6, 4, generator=generator)
    fold = Fold(
        channels=3,
        experts=3,
        divided=(FoldMember(parameter="up", axis=-2, start=3),),
        multiplied=(FoldMember(parameter="down", axis=-1),),
    )
    norm = Fold(channels=4, divided=(), multiplied=(FoldMember(parameter="up", axis=-1),))
    own, shared = (torch.rand(shape, generator=generator) + 0.5 for shape in ((3, 3), (4,)))
    factors = factors_of([(fold, own), (norm, shared)])
    up = factors["up"]
    scaled = up.apply(weight, torch.float32)
    for expert in range(3):
        for row in range(6):
            divisor = own[expert, row - 3] if row >= 3 else 1.0
            torch.testing.assert_close(scaled[expert, row], weight[expert, row] * shared / divisor)
    torch.testing.assert_close(up.undo(scaled.clone()), weight)
    # As checkpoints store experts: gate and up of each by themselves, or all in one stack.
    one_by_one = up.tensors([(3, 4)] * 6, 3)
    pieces = weight.view(6, 3, 4)
    for place, part in enumerate(one_by_one):
        assert torch.equal(part.apply(pieces[place], torch.float32), scaled.view(6, 3, 4)[place])


def test_what_is_kept_does_not_depend_on_microbatches() -> None:
    x = torch.randn(12, 300, 4, generator=torch.Generator().manual_seed(1))
    held_out = torch.arange(12) % 2 == 1
    kept = []
    for size in (1, 5, 12):
        rows = KeptRows()
        for start in range(0, 12, size):
            rows.add(divided(x[start : start + size], held_out[start : start + size]), 300)
        kept.append(rows.rows())
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert len(kept[0]) == ROWS
    assert torch.equal(kept[0][: OF_SEQUENCE - 28], x[1, ::3])
    alone = KeptRows()
    alone.add(divided(x[:1], held_out[:1]), 300)
    assert torch.equal(alone.rows(), x[0, ::3])


def test_it_is_for_formats_of_four_bits_that_round_activations() -> None:
    names = [FormatName.INT4, FormatName.NVFP4, FormatName.MXFP8, FormatName.BF16]
    found = judged_by(names)
    assert found is not None and found.name is FormatName.NVFP4
    assert judged_by([FormatName.FP8, FormatName.NVFP4A16, FormatName.INT4, FormatName.BF16]) is None
