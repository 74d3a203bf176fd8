"""Claims about how rounding is computed: what GPTQ factors and pushes on, and that pieces change no bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formats.base import Codec, grouped
from prismaquant_ray.formats.grids import e4m3_value, pack_nibbles, unpack_nibbles
from prismaquant_ray.forward import gptq as gptq_module
from prismaquant_ray.forward import scale_search
from prismaquant_ray.forward.gptq import Gptq, factorize, gptq
from prismaquant_ray.forward.scale_search import ScaleSearch, nearest, round_with, searched
from tests.reference.codecs import with_scale
from tests.reference.gptq import textbook

CODECS = list(codecs_of(FORMATS).values())
EACH_CODEC = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
FP8 = FORMATS[FormatName.FP8].codec
NVFP4 = FORMATS[FormatName.NVFP4].codec


def moments(features: int, *, tokens: int = 1024, seed: int = 0) -> Tensor:
    """Σ x xᵀ of correlated inputs, some louder than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(features) + torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(tokens, features, generator=generator) @ mix * torch.rand(features, generator=generator).exp()
    return x.T @ x


def weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def scale_of(codec: Codec, matrix: Tensor) -> Tensor | None:
    return codec.global_scale(float(matrix.abs().max()))


# --- GPTQ -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 3])
def test_the_factor_is_unit_upper_triangular_and_gives_the_damped_hessian_back(experts: int) -> None:
    hessians = torch.stack([moments(40, seed=seed) for seed in range(experts)])
    factor = factorize(hessians, Gptq(damping=0.05))
    for hessian, upper, order in zip(hessians.double(), factor.upper.double(), factor.order, strict=True):
        assert (upper.diagonal() == 1).all()
        assert torch.equal(upper, upper.triu())
        loudest_first = hessian.diagonal()[order]
        assert (loudest_first[:-1] >= loudest_first[1:]).all()
        damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
        damped = damped[order][:, order]
        # U⁻¹ H U⁻ᵀ is D: diagonal and positive.
        inverse = torch.linalg.inv(upper)
        pivots = inverse @ damped @ inverse.T
        assert (pivots.diagonal() > 0).all()
        assert float((pivots - pivots.diagonal().diag()).abs().max()) < 1e-5 * float(damped.max())


@EACH_CODEC
def test_every_column_is_rounded_to_what_is_nearest_after_the_errors_before_it(codec: Codec) -> None:
    matrix = weights(32, 128)
    factor = factorize(moments(128), Gptq())
    start = nearest(matrix, codec, scale_of(codec, matrix))
    values = gptq(matrix, start, codec, factor).values.double()
    scale = codec.scale_value(start.scale, start.global_scale).double()
    scale = scale.repeat_interleave(128 // scale.shape[1], dim=1)
    delta = (matrix - values * scale)[:, factor.order]
    wanted = matrix[:, factor.order] + delta @ factor.upper.double().triu(1)
    expected = codec.round((wanted / scale[:, factor.order]).float())
    # Float32 against float64: only what is within an ulp or so of a tie may differ.
    assert float((expected == values[:, factor.order]).float().mean()) > 0.999


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 23, 64, 100])
def test_errors_reach_every_later_column_once_whatever_the_number_of_columns(columns: int) -> None:
    matrix, hessian = weights(64, columns), moments(columns)
    start = nearest(matrix, FP8, None)
    ours = FP8.dequantized(gptq(matrix, start, FP8, factorize(hessian, Gptq()))).double()
    reference = textbook(matrix, start, FP8, hessian, 0.01).bfloat16().double()
    assert float((ours == reference).double().mean()) > 0.98


@EACH_CODEC
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_rows_are_rounded_alike_alone_stacked_and_in_pieces(
    codec: Codec, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows that share a scale stay together.
    sizes = (48, 16, 33) if codec.rows == 1 else (3 * codec.rows, codec.rows, 2 * codec.rows)
    members = [weights(size, 128, seed=size) for size in sizes]
    stack = torch.cat(members)
    factor = factorize(moments(128), Gptq())
    divisor = scale_of(codec, stack)
    whole = gptq(stack, nearest(stack, codec, divisor), codec, factor).values
    alone = [gptq(each, nearest(each, codec, divisor), codec, factor).values for each in members]
    assert torch.equal(torch.cat(alone), whole)
    monkeypatch.setattr(gptq_module, "_ROWS", rows)
    assert torch.equal(gptq(stack, nearest(stack, codec, divisor), codec, factor).values, whole)


def test_arguments_are_not_modified_however_they_lie_in_memory() -> None:
    by_column = weights(128, 64).T
    for matrix in (by_column, by_column.contiguous()):
        hessian = moments(128)
        factor = factorize(hessian, Gptq())
        start = nearest(matrix, NVFP4, scale_of(NVFP4, matrix))
        arguments = (matrix, hessian, factor.upper, factor.order, start.values)
        before = [argument.clone() for argument in arguments]
        gptq(matrix, start, NVFP4, factor)
        for argument, copy in zip(arguments, before, strict=True):
            assert torch.equal(argument, copy)


# --- search and rounding ----------------------------------------------------------------------------------------


# Blocks of rows have one scale each: tests/formats/test_formats.py.
@pytest.mark.parametrize("codec", [each for each in CODECS if each.rows == 1], ids=lambda codec: codec.name)
@given(seed=st.integers(0, 1000), spread=st.floats(0.0, 3.0), piece=st.sampled_from([100, 256, 1 << 16]))
@settings(deadline=None, max_examples=15)
def test_search_finds_the_scales_of_a_plain_loop_bit_for_bit(
    codec: Codec, seed: int, spread: float, piece: int
) -> None:
    matrix = weights(6, 128, seed=seed) * 10 ** (spread * weights(6, 128, seed=seed + 1))
    matrix[0, :64] = 0
    importance = weights(128, seed=seed + 2).square()
    divisor, settings_ = scale_of(codec, matrix), ScaleSearch()
    groups = grouped(matrix, 128 // codec.width(128))
    best, least = None, None
    for scale in codec.scale_candidates(groups.abs().amax(-1), divisor, settings_.multipliers(codec).float()):
        factor = codec.scale_value(scale, divisor).unsqueeze(-1)
        error = (codec.round(groups / factor) * factor - groups).square() * grouped(importance, groups.shape[1])
        error = error.sum(-1)
        if best is None or least is None:
            best, least = scale, error
        else:
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_search, "_PIECE", piece)
        found = searched(matrix, codec, divisor, importance, settings_)
    assert torch.equal(found.scale.view(torch.uint8), best.view(torch.uint8))
    assert torch.equal(
        found.values.view(torch.int32), with_scale(codec, matrix, best, divisor).values.view(torch.int32)
    )


@EACH_CODEC
@pytest.mark.parametrize("shape", [(7, 128), (3, 5, 128)])
def test_rounding_in_pieces_is_rounding(codec: Codec, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = weights(*shape)
    divisor = (
        scale_of(codec, matrix) if len(shape) == 2 else codec.global_scale(matrix.abs().amax((1, 2), keepdim=True))
    )
    whole = nearest(matrix, codec, divisor)
    factor = codec.scale_value(whole.scale, divisor)
    expected = codec.round(grouped(matrix, factor.shape[-1]) / factor.unsqueeze(-1)).flatten(-2)
    monkeypatch.setattr(scale_search, "_PIECE", 2 * 128)
    pieces = round_with(matrix, whole.scale, codec, divisor)
    for values in (whole.values, pieces.values):
        assert torch.equal(values.view(torch.int32), expected.view(torch.int32))


# --- codes ------------------------------------------------------------------------------------------------------


def test_every_byte_of_e4m3_has_the_value_that_torch_gives_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    for each in (codes, codes.T, codes[:, ::3]):
        value, expected = e4m3_value(each), each.to(torch.float32)
        # NaN has many bit patterns.
        assert torch.equal(value.isnan(), expected.isnan())
        assert torch.equal(value.nan_to_num(), expected.nan_to_num())
        assert torch.equal(value.signbit(), expected.signbit())


def test_nibbles_are_packed_lowest_first_and_looked_up_in_any_table() -> None:
    codes = torch.randint(16, (5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_nibbles(codes)
    assert torch.equal(packed, codes[:, ::2] + 16 * codes[:, 1::2])
    table = torch.randn(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack_nibbles(packed, table), table[codes.long()])
