"""Claims about rounding: search never loses, GPTQ is the textbook's, acceptance keeps the better."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formats.base import Codec, Rounded, experts_of
from prismaquant_ray.forward import encode, scale_search, statistics
from prismaquant_ray.forward import gptq as gptq_module
from prismaquant_ray.forward.encode import EncodedLinear, Rounding, encode_group
from prismaquant_ray.forward.gptq import Gptq, factorize, gptq
from prismaquant_ray.forward.scale_search import ScaleSearch, nearest, searched
from prismaquant_ray.forward.statistics import PRIOR_SHARE, InputStatistics, InputSums, Prior, divided, output_error
from tests.reference.gptq import textbook

EVERY_CODEC = pytest.mark.parametrize("codec", codecs_of(FORMATS).values(), ids=lambda codec: codec.name)
CODECS = [FORMATS[FormatName(name)].codec for name in ("NVFP4", "MXFP4", "INT3A16", "INT4", "INT6A16", "INT8", "MXFP8")]


def width_of(codec: Codec, least: int = 64) -> int:
    """Columns that the codec takes."""
    return max(least, codec.multiple)


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs with correlation and a few loud channels, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(tokens, features, generator=generator) @ (mix + torch.eye(features))
    x[:, :3] *= 8
    return x


def summed(*microbatches: tuple[Tensor, Tensor]) -> InputStatistics:
    sums = InputSums(microbatches[0][0].shape[-1], torch.device("cpu"))
    for x, held_out in microbatches:
        sums.add(*divided(x, held_out))
    return sums.statistics()


def statistics_of(x: Tensor, sequences: int = 8) -> InputStatistics:
    held = torch.zeros(sequences, dtype=torch.bool)
    held[-2:] = True
    return summed((x.view(sequences, -1, x.shape[1]), held))


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


@pytest.mark.parametrize("name", [FormatName.FP8_BLOCK, FormatName.INT4A8])
def test_gptq_under_scales_of_several_rows_or_of_a_row_equals_the_textbook(name: FormatName) -> None:
    codec = FORMATS[name].codec
    assert codec is not None
    matrix, x = weight(200, 256) * torch.logspace(-2, 0, 200).unsqueeze(1), correlated(2048, 256)
    start = nearest(matrix, codec, None)
    fast = codec.dequantized(gptq(matrix, start, codec, factorize(x.T @ x, Gptq(damping=0.05)))).double()
    slow = textbook(matrix, start, codec, x.T @ x, 0.05).bfloat16().double()
    assert float((fast == slow).float().mean()) > 0.9


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
            for scale in codec.scale_candidates(amax, start, settings.multipliers(codec).float()):
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
            assert result.figures.holdout_error[result.figures.method] == min(result.figures.holdout_error.values())
            delta = codec.dequantized(result.rounded).float() - member
            expected = float(output_error(delta, found.holdout).sum()) / (found.holdout_tokens * 16)
            assert result.figures.holdout_error[result.figures.method] == pytest.approx(expected, rel=1e-5)
            assert result.figures.weight_mse == pytest.approx(float(delta.square().mean()), rel=1e-6)


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


@pytest.mark.parametrize("panel", [1, 5, 16, 256])
def test_statistics_are_sums_over_the_right_tokens(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_PANEL", panel)
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    held = torch.tensor([False, True, False, False])
    whole = summed((x, held))
    parts = summed((x[:2], held[:2]), (x[2:], held[2:]))
    kept = x[~held].flatten(0, 1)
    assert torch.allclose(whole.train, kept.T @ kept, atol=1e-5)
    assert torch.allclose(whole.holdout, x[1].T @ x[1], atol=1e-5)
    assert (whole.train_tokens, whole.holdout_tokens) == (18, 6)
    assert whole.amax.tolist() == parts.amax.tolist() == x.abs().amax((0, 1)).tolist()
    assert whole.largest == float(x.abs().max())
    assert torch.allclose(whole.train, parts.train, atol=1e-5)
    assert torch.allclose(whole.importance, kept.square().mean(0), atol=1e-5)


def test_rows_taken_in_pieces_are_encoded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    found = statistics_of(correlated(1024, 64))
    members = [weight(40, 64, 5), weight(24, 64, 6)]
    for codec in CODECS:
        whole = encode_group(members, codec, found, Rounding().factor(found), Rounding())
        with monkeypatch.context() as patch:
            patch.setattr(encode, "AT_ONCE", 16 * 64)
            pieces = encode_group(members, codec, found, Rounding().factor(found), Rounding())
        for one, other in zip(whole, pieces, strict=True):
            assert_same(one.rounded, other.rounded)
            assert one.figures.method == other.figures.method
            assert other.figures.weight_mse == pytest.approx(one.figures.weight_mse, rel=1e-5)


def test_a_scale_that_many_multipliers_round_to_is_tried_once_and_in_order() -> None:
    groups = torch.tensor([[5, 5, 7, 7], [5, 5, 5, 5], [1, 2, 2, 3], [4, 4, 1, 4]], dtype=torch.uint8)
    distinct = scale_search._distinct(groups.T)
    assert distinct.T.tolist() == [[5, 7, 7], [5, 5, 5], [1, 2, 3], [4, 1, 4]]


# --- experts: a stack of matrices, each with its own share of the tokens ----------------------------------------

#: no token, one, fewer than columns, as many, and more than one tile of the statistics
COUNTS = (0, 1, 7, 64, 300, 0, 33, 129)


def routed_rows(counts: tuple[int, ...], features: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by expert, their counts, and which are held out: every fourth, so that a single one is not."""
    x = correlated(sum(counts), features) if sum(counts) else torch.zeros(0, features)
    return x, torch.tensor(counts, dtype=torch.int64), torch.arange(sum(counts)) % 4 == 3


def expert_weights(experts: int, rows: int, columns: int, seed: int = 1) -> Tensor:
    """Of different sizes, so that no expert could use another's scale."""
    return weight(experts * rows, columns, seed).view(experts, rows, columns) * torch.arange(1, experts + 1).view(
        -1, 1, 1
    )


def assert_same(one: Rounded, other: Rounded) -> None:
    for name in ("values", "scale", "global_scale"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours.float(), theirs.float()), name


def pooled(x: Tensor, held_out: Tensor) -> InputStatistics:
    """All rows of a layer as one dense input."""
    return summed((x.unsqueeze(1), held_out))


@EVERY_CODEC
def test_experts_are_encoded_together_as_each_alone(codec: Codec) -> None:
    x, counts, held_out = routed_rows(COUNTS, width_of(codec))
    prior = Prior.of(pooled(x, held_out))
    sizes = ((max(16, codec.rows), 3), (48, 4))
    members = [expert_weights(len(COUNTS), rows, width_of(codec), seed) for rows, seed in sizes]
    rounding = Rounding()
    found = InputStatistics.routed(x, counts, held_out, prior)
    together = encode_group(members, codec, found, rounding.factor(found), rounding)
    ends = counts.cumsum(0).tolist()
    for expert, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        own = slice(expert, expert + 1)
        alone = InputStatistics.routed(x[start:stop], counts[own], held_out[start:stop], prior)
        assert torch.equal(alone.train, found.train[own])
        assert torch.equal(alone.holdout, found.holdout[own])
        factor = rounding.factor(alone)
        for stack, one in zip(
            together, encode_group([m[own] for m in members], codec, alone, factor, rounding), strict=True
        ):
            assert_same(part(stack.rounded, own), one.rounded)
            assert [stack.figures.method[expert]] == one.figures.method
            for name, figure in one.figures.holdout_error.items():
                assert stack.figures.holdout_error[name][expert] == pytest.approx(figure[0], rel=1e-6)
            assert stack.figures.weight_mse[expert] == pytest.approx(one.figures.weight_mse[0], rel=1e-6)


@EVERY_CODEC
def test_an_expert_is_encoded_as_a_dense_matrix_of_its_statistics(codec: Codec) -> None:
    x, counts, held_out = routed_rows((300, 129), width_of(codec))
    found = InputStatistics.routed(x, counts, held_out)
    matrices = expert_weights(2, 32, width_of(codec))
    (stack,) = encode_group([matrices], codec, found, Rounding().factor(found), Rounding())
    for expert in range(2):
        dense = InputStatistics(
            train=found.train[expert],
            holdout=found.holdout[expert],
            train_tokens=int(found.train_weight[expert]),
            holdout_tokens=int(found.holdout_weight[expert]),
            amax=found.amax[expert],
        )
        (one,) = encode_group([matrices[expert]], codec, dense, Rounding().factor(dense), Rounding())
        assert_same(part(stack.rounded, expert, dense=True), one.rounded)
        assert stack.figures.method[expert] == one.figures.method


def part(stack: Rounded, experts: slice | int, *, dense: bool = False) -> Rounded:
    scale = None if stack.global_scale is None else stack.global_scale[experts]
    return Rounded(
        values=stack.values[experts],
        scale=stack.scale[experts],
        global_scale=scale.view(1) if dense and scale is not None else scale,
    )


def test_how_experts_are_split_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = FORMATS[FormatName.NVFP4].codec
    x, counts, held_out = routed_rows(COUNTS)
    matrices = expert_weights(len(COUNTS), 16, 64)

    def encoded() -> EncodedLinear:
        found = InputStatistics.routed(x, counts, held_out)
        (result,) = encode_group([matrices], codec, found, Rounding().factor(found), Rounding())
        return result

    whole = encoded()
    for module, name, size in (
        (encode, "AT_ONCE", 3 * 16 * 64),
        (statistics, "_CHUNK", 3 * 128 * 64),
        (gptq_module, "_CHUNK", 3 * 64 * 64),
        (gptq_module, "_ROWS", 3 * 16),
        (scale_search, "_PIECE", 5 * 64),
        (scale_search, "_PIECE", 3 * 16 * 64),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, size)
            split = encoded()
        assert_same(split.rounded, whole.rounded)
        assert (split.figures.method, split.figures.holdout_error) == (
            whole.figures.method,
            whole.figures.holdout_error,
        )


def test_statistics_of_experts_are_sums_over_their_rows_shrunk_towards_the_mean() -> None:
    x, counts, held_out = routed_rows(COUNTS)
    found = InputStatistics.routed(x.bfloat16(), counts, held_out)
    x = x.bfloat16().double()
    kappa = PRIOR_SHARE * 64
    for sums, tokens, prior, chosen in (
        (found.train, found.train_tokens, found.train_prior, ~held_out),
        (found.holdout, found.holdout_tokens, found.holdout_prior, held_out),
    ):
        mean = x[chosen].T @ x[chosen] / chosen.sum()
        start = 0
        for expert, count in enumerate(COUNTS):
            own = x[start : start + count][chosen[start : start + count]]
            start += count
            assert tokens[expert] == len(own)
            expected = (own.T @ own + kappa * mean).float()
            assert torch.allclose(sums[expert], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert prior == kappa
    of_experts = [rows.abs().amax(0).tolist() if len(rows) else [0.0] * 64 for rows in x.split(list(COUNTS))]
    assert found.amax.tolist() == of_experts
    assert found.importance.shape == (len(COUNTS), 64)
    whole = Prior.of(pooled(x.float(), held_out))
    again = InputStatistics.routed(x.float(), counts, held_out, whole)
    assert torch.allclose(again.train, found.train, rtol=1e-4, atol=1e-3)


@EVERY_CODEC
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5), zeros=st.sets(st.integers(0, 4)))
@example(counts=[0, 0], zeros={0})
@example(counts=[1], zeros=set())
@example(counts=[0, 1, 40], zeros={1})
@settings(deadline=None, max_examples=15)
def test_cold_experts_get_finite_weights_and_positive_scales(codec: Codec, counts: list[int], zeros: set[int]) -> None:
    x, tokens, held_out = routed_rows(tuple(counts), width_of(codec, 32))
    matrices = expert_weights(len(counts), 8, width_of(codec, 32))
    for expert in zeros & set(range(len(counts))):
        matrices[expert] = 0
    found = InputStatistics.routed(x, tokens, held_out)
    factor = Rounding().factor(found)
    assert factor.upper.isfinite().all()
    (result,) = encode_group([matrices], codec, found, factor, Rounding())
    assert (codec.scale_value(result.rounded.scale, result.rounded.global_scale) > 0).all()
    decoded = codec.decode(codec.pack(result.rounded))
    assert decoded.isfinite().all()
    assert torch.equal(decoded, codec.dequantized(result.rounded))
    for figures in (*result.figures.holdout_error.values(), result.figures.weight_mse):
        assert torch.tensor(figures).isfinite().all()
    for expert, trained in enumerate(found.train_tokens.tolist()):
        assert trained or result.figures.method[expert] != "gptq"
        assert expert not in zeros or not decoded[expert].any()


def test_an_expert_without_tokens_is_rounded_for_the_mean_input_of_its_layer() -> None:
    codec = FORMATS[FormatName.NVFP4].codec
    x, counts, held_out = routed_rows((0, 300))
    found = InputStatistics.routed(x, counts, held_out)
    matrices = expert_weights(2, 16, 64)
    (result,) = encode_group([matrices], codec, found, Rounding().factor(found), Rounding())
    assert result.figures.method == ["search", "gptq"]
    importance = x[~held_out].square().mean(0)
    alone = searched(matrices[0], codec, scale_of(codec, matrices[0]), importance, ScaleSearch())
    assert torch.equal(alone.scale.float(), result.rounded.scale[0].float())


def test_damping_rises_only_for_the_expert_that_needs_it() -> None:
    good, one = correlated(512, 64), torch.ones(32, 1) @ correlated(1, 64)
    both = torch.stack((good.T @ good, one.T @ one, good.T @ good))
    settings_ = Gptq(damping=1e-12)
    found = factorize(both, settings_)
    for expert, matrix in enumerate(both):
        alone = factorize(matrix, settings_)
        assert torch.equal(found.upper[expert], alone.upper)
        assert torch.equal(found.order[expert], alone.order)


@EVERY_CODEC
def test_every_expert_has_its_own_divisor_and_ships_what_it_would_alone(codec: Codec) -> None:
    matrices = expert_weights(3, 8, width_of(codec))
    amax = matrices.abs().amax((1, 2), keepdim=True)
    stack = nearest(matrices, codec, codec.global_scale(amax))
    for expert, shipped in enumerate(experts_of(codec.pack(stack))):
        alone = codec.pack(nearest(matrices[expert], codec, scale_of(codec, matrices[expert])))
        assert shipped.keys() == alone.keys()
        for suffix, tensor in alone.items():
            assert shipped[suffix].shape == tensor.shape
            assert torch.equal(shipped[suffix].view(torch.uint8), tensor.view(torch.uint8)), suffix
