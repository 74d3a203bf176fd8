"""Claims about rounding: search never loses, GPTQ is the textbook's, acceptance keeps the better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prismaquant_ray.formats import FORMATS, Codec, FormatName
from prismaquant_ray.rounding.encode import Rounding, encode_group
from prismaquant_ray.rounding.gptq import Gptq, factorize, gptq
from prismaquant_ray.rounding.hessian import InputStatistics, output_error
from prismaquant_ray.rounding.scale_search import ScaleSearch, nearest, searched
from tests.reference.gptq import textbook

CODECS = [FORMATS[name].codec for name in (FormatName.NVFP4, FormatName.MXFP4, FormatName.INT4, FormatName.MXFP8)]


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs with correlation and a few loud channels, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(tokens, features, generator=generator) @ (mix + torch.eye(features))
    x[:, :3] *= 8
    return x


def statistics_of(x: Tensor, sequences: int = 8) -> InputStatistics:
    held = torch.zeros(sequences, dtype=torch.bool)
    held[-2:] = True
    return InputStatistics.empty(x.shape[1], x.device).plus(x.view(sequences, -1, x.shape[1]), held)


def weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def scale_of(codec: Codec, matrix: Tensor) -> Tensor | None:
    return codec.global_scale(float(matrix.abs().max()))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_gptq_equals_the_textbook(codec: Codec) -> None:
    matrix, x = weight(24, 64), correlated(2048, 64)
    hessian = x.T @ x
    start = nearest(matrix, codec, scale_of(codec, matrix))
    fast = gptq(matrix, start, codec, factorize(hessian, Gptq(damping=0.01)))
    slow = textbook(matrix, start, codec, hessian, 0.01)
    factor = codec.scale_value(fast.scale, fast.global_scale)
    ours = fast.values.double() * factor.double().repeat_interleave(64 // factor.shape[1], dim=1)
    # Float32 against float64: a value within an ulp of a tie may round the other way and drag its row along.
    rows_equal = (ours == slow).all(dim=1)
    assert rows_equal.float().mean() >= 0.9
    fast_error = output_error((ours - matrix).float(), hessian).sum()
    slow_error = output_error((slow - matrix).float(), hessian).sum()
    assert float(fast_error) == pytest.approx(float(slow_error), rel=0.02)


def test_gptq_across_lazy_blocks_equals_the_textbook() -> None:
    codec = FORMATS[FormatName.MXFP8].codec
    assert codec is not None
    matrix, x = weight(4, 288), correlated(4096, 288)
    start = nearest(matrix, codec, None)
    fast = codec.dequantized(gptq(matrix, start, codec, factorize(x.T @ x, Gptq(damping=0.05)))).double()
    slow = textbook(matrix, start, codec, x.T @ x, 0.05).bfloat16().double()
    assert float((fast == slow).float().mean()) > 0.95


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_gptq_beats_search_beats_nearest_on_the_data_it_saw(codec: Codec) -> None:
    matrix, x = weight(48, 128), correlated(4096, 128)
    found = statistics_of(x)
    start = scale_of(codec, matrix)
    candidates = [nearest(matrix, codec, start), searched(matrix, codec, start, found.importance, ScaleSearch())]
    candidates.append(gptq(matrix, candidates[1], codec, factorize(found.train, Gptq())))
    diagonal = torch.diag(found.train.diagonal())
    weighted = [float(output_error(codec.dequantized(c).float() - matrix, diagonal).sum()) for c in candidates]
    assert weighted[1] <= weighted[0]
    whole = [float(output_error(codec.dequantized(c).float() - matrix, found.train).sum()) for c in candidates]
    assert whole[2] < whole[1]


def test_search_finds_the_best_of_every_candidate() -> None:
    codec = FORMATS[FormatName.NVFP4].codec
    assert codec is not None
    matrix = weight(3, 32)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.1
    settings = ScaleSearch(grid=5, span=(0.6, 1.2))
    start = scale_of(codec, matrix)
    chosen = searched(matrix, codec, start, importance, settings)
    amax = matrix.view(3, 2, 16).abs().amax(-1)
    for row in range(3):
        for group in range(2):
            columns = slice(16 * group, 16 * group + 16)
            errors = []
            for scale in codec.scale_candidates(amax, start, settings.multipliers()):
                factor = codec.scale_value(scale, start)[row, group]
                error = codec.round(matrix[row, columns] / factor) * factor - matrix[row, columns]
                errors.append(float((error.square() * importance[columns]).sum()))
            factor = codec.scale_value(chosen.scale, start)[row, group]
            found = (chosen.values[row, columns] * factor - matrix[row, columns]).square() * importance[columns]
            assert float(found.sum()) == pytest.approx(min(errors), rel=1e-6)


def test_acceptance_keeps_the_smallest_held_out_error() -> None:
    codec = FORMATS[FormatName.NVFP4].codec
    assert codec is not None
    # Fewer tokens than columns: GPTQ fits noise and may lose; whatever wins must be the smallest.
    for tokens in (64, 4096):
        found = statistics_of(correlated(tokens, 128))
        members = [weight(16, 128, seed) for seed in (3, 4)]
        rounding = Rounding()
        for member, result in zip(
            members, encode_group(members, codec, found, rounding.factor(found), rounding), strict=True
        ):
            assert result.holdout_error[result.method] == min(result.holdout_error.values())
            delta = codec.dequantized(result.rounded).float() - member
            expected = float(output_error(delta, found.holdout).sum()) / (found.holdout_tokens * 16)
            assert result.holdout_error[result.method] == pytest.approx(expected, rel=1e-5)
            assert result.weight_mse == pytest.approx(float(delta.square().mean()), rel=1e-6)


def test_fused_members_share_one_global_scale_and_stacking_changes_nothing_else() -> None:
    codec = FORMATS[FormatName.NVFP4].codec
    assert codec is not None
    found = statistics_of(correlated(1024, 64))
    small, large = weight(8, 64, 5) * 0.1, weight(8, 64, 6)
    rounding = Rounding()
    factor = rounding.factor(found)
    together = encode_group([small, large], codec, found, factor, rounding)
    scales = [result.rounded.global_scale for result in together]
    assert scales[0] is not None
    assert scales[1] is not None
    assert torch.equal(scales[0], scales[1])
    alone = encode_group([large], codec, found, factor, rounding)[0]
    assert torch.equal(alone.rounded.values, together[1].rounded.values)


def test_dead_columns_and_zero_weights_leave_no_nan() -> None:
    x = correlated(512, 64)
    x[:, 10:20] = 0
    found = statistics_of(x)
    matrix = weight(8, 64)
    matrix[3] = 0
    rounding = Rounding()
    for codec in CODECS:
        assert codec is not None
        (result,) = encode_group([matrix], codec, found, rounding.factor(found), rounding)
        decoded = codec.dequantized(result.rounded)
        assert torch.isfinite(decoded).all()
        assert (decoded[3] == 0).all()


def test_a_singular_hessian_is_damped_until_it_factors() -> None:
    x = torch.ones(32, 1) @ correlated(1, 64)
    factor = factorize(x.T @ x, Gptq(damping=1e-12))
    assert torch.isfinite(factor.upper).all()


def test_statistics_are_sums_over_the_right_tokens() -> None:
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    held = torch.tensor([False, True, False, False])
    whole = InputStatistics.empty(16, x.device).plus(x, held)
    parts = InputStatistics.empty(16, x.device).plus(x[:2], held[:2]).plus(x[2:], held[2:])
    kept = x[~held].flatten(0, 1)
    assert torch.allclose(whole.train, kept.T @ kept, atol=1e-5)
    assert torch.allclose(whole.holdout, x[1].T @ x[1], atol=1e-5)
    assert (whole.train_tokens, whole.holdout_tokens) == (18, 6)
    assert whole.amax == parts.amax == float(x.abs().max())
    assert torch.allclose(whole.train, parts.train, atol=1e-5)
    assert torch.allclose(whole.importance, kept.square().mean(0), atol=1e-5)
