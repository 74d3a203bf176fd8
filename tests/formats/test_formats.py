"""Formats: what is packed is what compressed-tensors reads, and what was measured is what will run."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formats.base import Codec, Format, Rounded, Tensors, experts_of, grouped, stack
from prismaquant_ray.formats.grids import e8m0_value, snap
from prismaquant_ray.formats.nvfp4 import divisor
from prismaquant_ray.forward.scale_search import ScaleSearch, searched
from tests.reference.codecs import nearest_rounding, with_scale

CODED = [f for f in FORMATS.values() if f.codec is not None]
ROUNDING_ACTIVATIONS = [f for f in CODED if f.round_activation is not None]
CODECS = list(codecs_of(FORMATS).values())
EACH_FORMAT = pytest.mark.parametrize("format_", CODED, ids=lambda f: f.name)
EACH_CODEC = pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)

#: one row, one group, and widths at which INT4 falls back to groups of 64 and 32
SHAPES = [(1, 16), (1, 32), (3, 48), (5, 128), (4, 192), (2, 160), (1, 256), (16, 512)]
# whole blocks of rows, and a part of one more
SHAPES += [(128, 128), (300, 256)]
E4M3_CODES = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127].view(torch.float8_e4m3fn)


# BF16 bit patterns of magnitudes up to 2¹²⁷, half the range: closer to its end the nearest grid point can lie beyond.
BF16_WEIGHTS = st.lists(st.integers(-0x7F00, 0x7F00), min_size=128, max_size=128).map(
    lambda n: (torch.tensor(n, dtype=torch.int32).abs() << 16).view(torch.float32).copysign(torch.tensor(n)).view(2, 64)
)


def weights(rows: int, columns: int) -> dict[str, Tensor]:
    """BF16 weights in float32: ordinary ones and those that break codecs."""
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    with_zeros = normal.clone()
    with_zeros[:, : columns // 2] = 0
    outlier = normal * 0.02
    outlier[-1, 3] = 700.0
    per_column = normal * 10.0 ** torch.linspace(-20, 12, columns)
    negative_zeros = normal.clone()
    negative_zeros[:, ::3] = -0.0
    spread = torch.tensor([-1.5, 6.0, 0.1, 3.0]).repeat(rows, columns // 4) * 2.0 ** (
        torch.arange(rows) % 16
    ).unsqueeze(1)
    cases = {
        "normal": normal,
        "group of zeros": with_zeros,
        "all zeros": torch.zeros(rows, columns),
        "huge": normal * 1e35,
        "tiny": normal * 1e-35,
        "subnormal": normal * 1e-39,
        "outlier": outlier,
        "subnormal group scales": per_column,
        "negative zeros": negative_zeros,
        "grid values": spread,
    }
    return {name: case.to(torch.bfloat16).float() for name, case in cases.items()}


def accepted(codec: Codec) -> list[tuple[str, Tensor]]:
    """Every weight of every shape that the codec takes."""
    shapes = [shape for shape in SHAPES if codec.refusal(*shape) is None]
    return [(f"{name} {shape}", weight) for shape in shapes for name, weight in weights(*shape).items()]


def scheme_of(format_: Format, in_features: int) -> QuantizationScheme:
    """The scheme as compressed-tensors validates it."""
    weight_args, activation_args = format_.scheme(in_features)
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weight_args),
        input_activations=QuantizationArgs(**activation_args) if activation_args else None,
        format=format_.compression,
    )


def decompressed(format_: Format, tensors: Tensors, in_features: int) -> Tensor:
    compressor = BaseCompressor.get_value_from_registry(format_.compression)
    return compressor.decompress(tensors, scheme_of(format_, in_features))["weight"]


def fitting(codec: Codec, weight: Tensor) -> Tensor:
    """The same weights in rows that the codec takes."""
    return weight.view(-1, max(64, codec.multiple))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


# --- what is packed ---------------------------------------------------------------------------------------------


@EACH_FORMAT
@pytest.mark.parametrize("in_features", [32, 64, 128, 192])
def test_compressed_tensors_accepts_the_scheme_and_would_choose_the_same_compressor(
    format_: Format, in_features: int
) -> None:
    scheme = scheme_of(format_, in_features)
    # It would store four bits under 8-bit activations in a byte each, which vLLM does not load.
    assert format_.name == "INT4A8" or infer_module_format(torch.nn.Linear, scheme).value == format_.compression
    assert scheme.weights.group_size in (None, format_.codec.width(in_features))
    assert scheme.weights.block_structure in (None, [format_.codec.rows, format_.codec.width(in_features)])


def test_schemes_name_what_vllm_recognises_the_formats_by() -> None:
    weights_of, activations_of = ({f.name: f.scheme(128)[i] for f in CODED} for i in (0, 1))
    for name in ("MXFP8", "MXFP4"):
        assert weights_of[name]["scale_dtype"] == activations_of[name]["scale_dtype"] == "torch.uint8"
        assert activations_of[name]["dynamic"] is True
    assert activations_of["NVFP4"]["dynamic"] == "local"
    assert activations_of["FP8"] | {"strategy": "channel", "dynamic": False} == weights_of["FP8"]
    assert weights_of["NVFP4"] == weights_of["NVFP4A16"]


@EACH_FORMAT
def test_compressed_tensors_decompresses_to_the_decoded_weight(format_: Format) -> None:
    for name, weight in accepted(format_.codec):
        tensors = format_.codec.pack(nearest_rounding(format_.codec, weight))
        theirs = decompressed(format_, tensors, weight.shape[1])
        # In the type of the scale, which transformers makes the model's.
        assert theirs.dtype == tensors["weight_scale"].dtype or theirs.dtype == torch.bfloat16, name
        assert torch.equal(bits(theirs.bfloat16()), bits(format_.codec.decode(tensors))), name


@pytest.mark.parametrize("name", ["MXFP8", "MXFP4"])
def test_every_code_under_every_power_of_two_decodes_as_in_compressed_tensors(name: str) -> None:
    scale = torch.arange(1, 255, dtype=torch.uint8)
    if name == "MXFP8":
        row = torch.cat((E4M3_CODES, E4M3_CODES[:2])).repeat(len(scale), 1)
        tensors = {"weight": row, "weight_scale": scale.unsqueeze(1).repeat(1, 8)}
    else:
        row = torch.arange(256, dtype=torch.uint8).repeat(len(scale), 1)
        tensors = {"weight_packed": row, "weight_scale": scale.unsqueeze(1).repeat(1, 16)}
    format_ = FORMATS[FormatName(name)]
    assert torch.equal(bits(decompressed(format_, tensors, 256)), bits(format_.codec.decode(tensors)))


@pytest.mark.parametrize("name", ["FP8", "INT4"])
def test_every_code_under_every_bf16_mantissa_decodes_as_in_compressed_tensors(name: str) -> None:
    mantissas = (torch.arange(128, 256).unsqueeze(1) * 2.0 ** torch.arange(-140, 120, 20)).flatten()
    scale = mantissas.to(torch.bfloat16).unsqueeze(1)
    format_ = FORMATS[FormatName(name)]
    if name == "FP8":
        tensors = {"weight": E4M3_CODES.repeat(len(scale), 1), "weight_scale": scale}
    else:
        values = torch.arange(-8.0, 8.0).repeat(len(scale), 2)
        tensors = format_.codec.pack(Rounded(values=values, scale=scale, global_scale=None))
    width = 254 if name == "FP8" else 32
    assert torch.equal(bits(decompressed(format_, tensors, width)), bits(format_.codec.decode(tensors)))


def test_every_nvfp4_code_scale_and_divisor_decodes_alike_in_compressed_tensors_and_in_vllm() -> None:
    format_ = FORMATS[FormatName.NVFP4]
    scale = E4M3_CODES[1:127].unsqueeze(1)
    codes = torch.arange(8, dtype=torch.uint8).repeat(len(scale), 1) * 0x11 ^ 0x80
    for mantissa, exponent in product(range(128, 256), (-20, 0, 7)):
        g = torch.tensor([mantissa * 2.0**exponent])
        tensors = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": g}
        ours = format_.codec.decode(tensors)
        assert torch.equal(bits(decompressed(format_, tensors, 16)), bits(ours))
        values = format_.codec.decode({**tensors, "weight_scale": torch.ones_like(scale), "weight_global_scale": g / g})
        assert torch.equal((values.float() * (scale.float() * (1 / g))).bfloat16(), ours)  # vLLM inverts g on load


@EACH_FORMAT
def test_packing_equals_compressed_tensors_byte_for_byte(format_: Format) -> None:
    codec = format_.codec
    compressor = BaseCompressor.get_value_from_registry(format_.compression)
    for name, weight in accepted(codec):
        # compressed-tensors drops the sign of an exact -0.0 in E2M1; see the next test.
        rounded = nearest_rounding(codec, weight + 0.0)
        source = {"weight": weight + 0.0, "weight_scale": rounded.scale[:: codec.rows].float()}
        if rounded.global_scale is None and rounded.scale.dtype == torch.uint8:
            source["weight_scale"] = e8m0_value(rounded.scale)
        if rounded.global_scale is not None:
            source["weight_global_scale"] = rounded.global_scale
        theirs = compressor.compress(source, scheme_of(format_, weight.shape[1]))
        ours = codec.pack(rounded)
        assert ours.keys() == theirs.keys(), name
        for key, tensor in ours.items():
            # An uncompressed scale keeps the dtype it was given; ours is BF16 and was given in float32.
            expected = theirs[key].to(torch.bfloat16) if tensor.dtype == torch.bfloat16 else theirs[key]
            assert expected.dtype == tensor.dtype and expected.shape == tensor.shape, (name, key)
            assert torch.equal(bits(expected), bits(tensor)), (name, key)


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4", "MXFP8", "FP8"])
def test_negative_zero_survives_packing(name: str) -> None:
    codec = FORMATS[FormatName(name)].codec
    weight = torch.tensor([1.0, -0.0, 0.0, -1e-9]).repeat(2, 8)
    decoded = codec.decode(codec.pack(nearest_rounding(codec, weight)))
    assert torch.equal(decoded.signbit(), weight.signbit())
    assert decoded[:, 1:4].count_nonzero() == 0


@EACH_CODEC
def test_what_is_measured_is_what_is_decoded(codec: Codec) -> None:
    for name, weight in accepted(codec):
        rounded = nearest_rounding(codec, weight)
        # Equal as numbers: integers have no negative zero, `values` may.
        assert torch.equal(codec.decode(codec.pack(rounded)), codec.dequantized(rounded)), name


@EACH_CODEC
def test_a_member_of_a_stacked_group_packs_as_its_rows_of_the_stack(codec: Codec) -> None:
    rounded = nearest_rounding(codec, weights(8 * codec.rows, 128)["normal"])
    whole, part = codec.pack(rounded), codec.pack(rounded.rows(2 * codec.rows, 5 * codec.rows))
    for key in whole.keys() - {"weight_shape", "weight_global_scale"}:
        rows = 1 if key == "weight_scale" else codec.rows
        assert torch.equal(bits(part[key]), bits(whole[key][2 * rows : 5 * rows])), key
    assert "weight_shape" not in part or part["weight_shape"].tolist() == [3, 128]


@EACH_CODEC
def test_packed_tensors_own_their_memory(codec: Codec) -> None:
    rounded = nearest_rounding(codec, weights(4, 128)["normal"])
    for tensor in codec.pack(rounded).values():
        assert tensor.is_contiguous()
    if rounded.global_scale is not None:
        assert codec.pack(rounded)["weight_global_scale"].data_ptr() != rounded.global_scale.data_ptr()


@EACH_CODEC
def test_a_stack_packs_and_decodes_as_each_of_its_matrices(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(weights(5, 128).values())
    each = [nearest_rounding(codec, case) for case in cases]
    divisors = [one.global_scale for one in each]
    rounded = Rounded(
        values=torch.stack([one.values for one in each]),
        scale=torch.stack([one.scale for one in each]),
        global_scale=None if divisors[0] is None else torch.stack(divisors).unsqueeze(-1),
    )
    amax = torch.stack(cases).abs().amax((1, 2), keepdim=True)
    assert divisors[0] is None or torch.equal(codec.global_scale(amax), rounded.global_scale)
    for piece in (1 << 20, 300):
        monkeypatch.setattr("prismaquant_ray.formats.base._PIECE", piece)
        packed = codec.pack(rounded)
        for one, expert in zip(each, experts_of(packed), strict=True):
            for suffix, tensor in codec.pack(one).items():
                assert expert[suffix].shape == tensor.shape
                assert torch.equal(bits(expert[suffix]), bits(tensor)), suffix
        decoded = codec.decode(stack(experts_of(packed)))
        assert torch.equal(bits(decoded), bits(torch.stack([codec.decode(codec.pack(one)) for one in each])))
        assert torch.equal(decoded, codec.dequantized(rounded))


@EACH_CODEC
def test_grid_values_kept_in_a_byte_are_the_same_values(codec: Codec) -> None:
    for name, weight in accepted(codec):
        rounded = nearest_rounding(codec, weight)
        values = rounded.values.to(codec.kept)
        assert values.itemsize == 1
        kept = Rounded(values=values, scale=rounded.scale, global_scale=rounded.global_scale)
        assert torch.equal(kept.values.float(), rounded.values), name
        assert not values.is_floating_point() or torch.equal(bits(kept.values.float()), bits(rounded.values)), name
        for suffix, tensor in codec.pack(rounded).items():
            assert torch.equal(bits(codec.pack(kept)[suffix]), bits(tensor)), name


@EACH_CODEC
@given(x=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
@settings(deadline=None)
def test_a_codec_rounds_to_its_grid_and_snapping_is_rounding_but_for_the_sign_of_zero(
    codec: Codec, x: list[float]
) -> None:
    values = torch.tensor(x)
    assert torch.equal(codec.snap(values), codec.round(values))
    assert torch.equal(bits(codec.round(values)), bits(snap(values, codec.grid).copysign_(values)))


# --- rounding to nearest ----------------------------------------------------------------------------------------


@EACH_CODEC
def test_rounding_a_decoded_weight_again_gives_the_same_codes(codec: Codec) -> None:
    for name, weight in accepted(codec):
        if "subnormal" in name or "tiny" in name:
            continue  # BF16 itself loses bits there
        rounded = nearest_rounding(codec, weight)
        tensors = codec.pack(rounded)
        again = with_scale(codec, codec.decode(tensors).float(), rounded.scale, rounded.global_scale)
        for key, tensor in codec.pack(again).items():
            assert torch.equal(bits(tensor), bits(tensors[key])), (name, key)


@EACH_CODEC
@given(weight=BF16_WEIGHTS)
@example(weight=torch.zeros(2, 64))
@example(weight=torch.full((2, 64), 2.0**127))
@example(weight=torch.full((2, 64), -(2.0**-133)))
@settings(deadline=None)
def test_finite_weights_decode_to_finite_weights_under_scales_that_are_positive(codec: Codec, weight: Tensor) -> None:
    rounded = nearest_rounding(codec, fitting(codec, weight))
    factor = codec.scale_value(rounded.scale, rounded.global_scale)
    assert factor.isfinite().all() and (factor > 0).all()
    assert codec.decode(codec.pack(rounded)).isfinite().all()


@EACH_CODEC
@given(weight=BF16_WEIGHTS)
@settings(deadline=None)
def test_searched_scales_are_storable_and_positive_and_begin_with_the_nearest(codec: Codec, weight: Tensor) -> None:
    weight = fitting(codec, weight)
    g = codec.global_scale(weight.abs().max().item())
    amax = grouped(weight, weight.shape[1] // codec.width(weight.shape[1])).abs().amax(-1)
    nearest_scale = codec.nearest_scale(amax, g)
    multipliers = torch.tensor([1.0, 0.8, 1.5])
    tried = multipliers[multipliers <= codec.largest_multiplier]
    for place, scale in enumerate(codec.scale_candidates(amax, g, tried)):
        assert scale.dtype == nearest_scale.dtype and scale.shape == amax.shape
        factor = codec.scale_value(scale, g)
        assert factor.isfinite().all() and (factor > 0).all()
        assert place > 0 or torch.equal(bits(scale), bits(nearest_scale))
        # 1.5 is not tried. A scale that vanishes becomes one.
        smaller = (factor <= codec.scale_value(nearest_scale, g)) | (factor == 1)
        assert codec.name == "nvfp4" or smaller.all()


@given(weight=BF16_WEIGHTS)
@settings(deadline=None)
def test_mxfp8_never_clips(weight: Tensor) -> None:
    codec = FORMATS[FormatName.MXFP8].codec
    amax = grouped(weight, 2).abs().amax(-1)
    assert (amax <= 448 * codec.scale_value(codec.nearest_scale(amax, None), None)).all()


def test_blocks_have_one_power_of_two_that_requantizing_leaves() -> None:
    codec = FORMATS[FormatName.FP8_BLOCK].codec
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    weight *= torch.logspace(-3, 3, 300).unsqueeze(1)
    tensors = codec.pack(nearest_rounding(codec, weight))
    assert tensors["weight_scale"].shape == (3, 2)
    decoded = codec.decode(tensors).float()
    for row, column in product(range(3), range(2)):
        place = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
        scale = float(tensors["weight_scale"][row, column])
        amax = float(weight[place].abs().max())
        assert scale == 2.0 ** math.ceil(math.log2(amax / 448))
        # vLLM, for DeepGEMM: the block's largest weight over 448, raised to a power of two, and codes under that.
        again = 2.0 ** math.ceil(math.log2(float(decoded[place].abs().max()) / 448))
        assert torch.equal((decoded[place] / again).to(torch.float8_e4m3fn).float() * again, decoded[place])


def test_scales_under_8_bit_activations_survive_what_the_kernel_makes_of_them() -> None:
    codec = FORMATS[FormatName.INT4A8].codec
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 2, 64).unsqueeze(1)
    weight *= torch.logspace(-2, 0, 8).repeat_interleave(128)
    importance = torch.ones(1024)
    for rounded in (nearest_rounding(codec, weight), searched(weight, codec, None, importance, ScaleSearch())):
        scale = rounded.scale.float()
        of_row = (scale.amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
        e = ((scale / of_row).to(torch.float8_e4m3fn).float() / 8).to(torch.float8_e4m3fn).float()
        served = e * (8 * of_row)
        small = (of_row <= 1 / (448 * 512)).flatten()
        assert small.any() and not small.all()
        assert torch.equal(served[~small], scale[~small])
        assert ((served - scale).abs() <= 2.0**-8 * scale).all()
    # The search has something to choose from all the same.
    assert (rounded.scale != nearest_rounding(codec, weight).scale).any()


@pytest.mark.parametrize("k", [-100, -9, 0, 1, 100])
def test_mxfp8_keeps_a_group_that_ends_exactly_at_the_end_of_the_grid(k: int) -> None:
    codec = FORMATS[FormatName.MXFP8].codec
    weight = E4M3_CODES.float().repeat(1, 16).view(-1, 254)[:, :224].contiguous() * 2.0**k
    weight[:, ::32] = 448 * 2.0**k
    rounded = nearest_rounding(codec, weight)
    assert (rounded.scale == 127 + k).all()
    assert torch.equal(codec.decode(codec.pack(rounded)).float(), weight)
    one_more = codec.nearest_scale(torch.tensor([[448 * 2.0**k * (1 + 2.0**-7)]]), None)
    assert one_more.item() == 128 + k


@given(amax=st.floats(2.0**-133, 2.0**127, width=32), headroom=st.sampled_from([1.0, 1.5, 2.0]))
@settings(deadline=None)
def test_the_divisor_is_the_largest_bf16_that_leaves_the_headroom(amax: float, headroom: float) -> None:
    g = divisor(amax, headroom)
    assert g.dtype == torch.float32 and g.shape == (1,)
    assert torch.equal(g.to(torch.bfloat16).float(), g) and g.item() > 0
    assert g.item() * headroom * amax <= 448 * 6 * (1 + 2.0**-23)
    following = (g.view(torch.int32) + (1 << 16)).view(torch.float32).item()
    assert following == float("inf") or following * headroom * amax > 448 * 6 * (1 - 2.0**-23)


def test_the_divisor_of_zeros_is_one() -> None:
    assert divisor(0.0, 1.5).tolist() == [1.0]


@given(amax=st.floats(2.0**-100, 2.0**127, width=32))
@settings(deadline=None)
def test_the_largest_group_of_nvfp4_may_be_searched_upward_without_saturating(amax: float) -> None:
    codec = FORMATS[FormatName.NVFP4].codec
    g = codec.global_scale(amax)
    wanted = 1.5 * amax / 6 * g.item()
    (scale,) = codec.scale_candidates(torch.tensor([[amax]]), g, torch.tensor([1.5]))
    assert wanted <= 448 * (1 + 2.0**-22)
    assert scale.item() == pytest.approx(wanted, rel=1 / 16)


@pytest.mark.parametrize("name", ["NVFP4", "FP8", "INT3A16", "INT4", "INT6A16", "INT8", "INT8A16"])
def test_nearest_scales_are_those_of_compressed_tensors(name: str) -> None:
    # Not the power-of-two ones: ours are the smallest that do not clip, which theirs are not.
    format_ = FORMATS[FormatName(name)]
    for case, weight in accepted(format_.codec):
        g = format_.codec.global_scale(weight.abs().max().item())
        groups = grouped(weight, weight.shape[1] // format_.codec.width(weight.shape[1]))
        amax = groups.abs().amax(-1)
        args = scheme_of(format_, weight.shape[1]).weights
        theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=g)
        ours = format_.codec.nearest_scale(amax, g)
        theirs = theirs.to(ours.dtype)
        # A BF16 scale of zero, be it of zeros or by underflow, becomes 1 here and an epsilon or zero there.
        chosen = (amax > 0) & (theirs.float() > 0) if g is None else torch.ones_like(amax, dtype=torch.bool)
        assert torch.equal(ours[chosen].float(), theirs[chosen].float()), case


@pytest.mark.parametrize("name", ["FP8", "INT3A16", "INT4", "INT6A16", "INT8", "INT8A16"])
def test_channel_scales_are_bf16_and_groups_of_zeros_get_one(name: str) -> None:
    codec = FORMATS[FormatName(name)].codec
    scale = codec.nearest_scale(torch.tensor([[0.0, 3.0]]), None)
    assert scale.dtype == torch.bfloat16
    assert scale[0, 0].item() == 1
    assert scale[0, 1].item() == pytest.approx(3 / codec.grid_max, rel=2.0**-8)


# --- activations ------------------------------------------------------------------------------------------------


def activations() -> Tensor:
    """Tokens (64, 512): magnitudes that differ by channel and token, outliers, and tokens of zeros."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 512, generator=generator) * torch.randn(512, generator=generator).exp()
    x *= 10.0 ** torch.linspace(-30, 4, 64).unsqueeze(1)
    x[::16, 5] *= 1000
    x[7] = 0
    x[8, :64] = 0
    x[9, 1:] = 0
    return x


def runtime_rounding(format_: Format, x: Tensor, input_scale: Tensor | None) -> Tensor:
    """Fake quantization of compressed-tensors; it takes scales per token only from (batch, token, channel)."""
    args = scheme_of(format_, x.shape[-1]).input_activations
    scale, zero_point = compute_dynamic_scales_and_zp(
        x.unsqueeze(0), args, torch.nn.Identity(), global_scale=input_scale
    )
    return fake_quantize(x.unsqueeze(0), scale, zero_point, args, global_scale=input_scale).squeeze(0)


@pytest.mark.parametrize("format_", [f for f in ROUNDING_ACTIVATIONS if f.name != "INT8"], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_rounding_is_that_of_compressed_tensors(format_: Format, dtype: torch.dtype) -> None:
    x = activations().to(dtype).float()
    before = x.clone()
    # A static divisor may leave headroom, and may have been calibrated on smaller activations.
    margins = (1.0, 2.0, 448.0, 1 / 64) if format_.static_input_scale else (None,)
    for margin in margins:
        input_scale = None if margin is None else divisor(x.abs().max().item(), margin)
        rounded = format_.round_activation(x, input_scale)
        assert torch.equal(bits(rounded), bits(runtime_rounding(format_, x, input_scale))), margin
        assert rounded[7].count_nonzero() == 0
        assert rounded.isfinite().all()
    assert torch.equal(x, before)


def test_integer_activations_are_rounded_as_vllm_rounds_them() -> None:
    format_ = FORMATS[FormatName.INT8]
    x = activations()[::4, :96]
    rounded = format_.round_activation(x, None)
    for row, found in zip(x, rounded, strict=True):
        amax = row.abs().max()
        for value, result in zip(row, found, strict=True):
            code = round(float(value * (127 / amax))) if amax > 0 else 0
            assert result == code * (amax / 127)
    assert rounded.isfinite().all()
    theirs = runtime_rounding(format_, x, None)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((theirs - rounded).abs() <= step * 1.01).all() and not torch.equal(theirs, rounded)
    # Too small for 127 / amax to be a number: no NaN.
    assert format_.round_activation(torch.tensor([[1e-38, 0.0]]), None).isfinite().all()


def test_scales_of_nvfp4_are_computed_in_the_order_of_compressed_tensors() -> None:
    # Here amax · (g / 6) is a float32 ulp from (amax / 6) · g, on the other side of a tie between two E4M3 scales.
    format_ = FORMATS[FormatName.NVFP4]
    x = torch.linspace(0, float.fromhex("0x1.c7fffep-1"), 16).unsqueeze(0)
    g = torch.tensor([1024.0])
    assert torch.equal(format_.round_activation(x, g), runtime_rounding(format_, x, g))
    (theirs, _) = calculate_qparams(x.amin(-1), x.amax(-1), scheme_of(format_, 16).weights, global_scale=g)
    assert format_.codec.nearest_scale(x.amax(-1), g).float().item() == theirs.item()
    (searched,) = format_.codec.scale_candidates(x.amax(-1), g, torch.tensor([1.0]))
    assert searched.float().item() == theirs.item()


def test_formats_with_sixteen_bit_activations_round_none() -> None:
    kept = {f.name for f in FORMATS.values() if f.round_activation is None}
    assert kept == {"BF16", "INT3A16", "INT4", "INT6A16", "INT8A16", "NVFP4A16"}
    assert all(f.scheme(128)[1] is None for f in CODED if f.name in kept)


# --- size and shape ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    [
        ("BF16", 16),
        ("FP8", 8 + 16 / 512),
        ("FP8_BLOCK", 8 + 32 / 128 / 128),
        ("INT3A16", 3.125),
        ("INT4", 4.125),
        ("INT4A8", 4.125),
        ("INT6A16", 6.125),
        ("INT8", 8 + 16 / 512),
        ("INT8A16", 8.125),
        ("MXFP4", 4.25),
        ("MXFP4A8", 4.25),
        ("MXFP8", 8.25),
        ("NVFP4", 4.5),
    ],
)
def test_bits_per_weight(name: str, bits_per_weight: float) -> None:
    assert FORMATS[FormatName(name)].bits(256, 512) == bits_per_weight
    assert FORMATS[FormatName(name)].refusal(256, 512) is None


def test_narrower_groups_of_int4_cost_more() -> None:
    assert [FORMATS[FormatName.INT4].bits(8, width) for width in (128, 192, 160)] == [4.125, 4.25, 4.5]


@EACH_FORMAT
def test_bytes_are_those_of_the_packed_tensors(format_: Format) -> None:
    for shape in SHAPES:
        if format_.refusal(*shape):
            continue
        packed = format_.codec.pack(nearest_rounding(format_.codec, weights(*shape)["normal"]))
        written = sum(tensor.nbytes for tensor in packed.values())
        input_global_scale = 4 if format_.static_input_scale else 0
        assert format_.weight_bytes(*shape) + format_.extra_bytes() == written + input_global_scale, shape


@EACH_CODEC
def test_a_shape_is_refused_with_its_number_or_packs(codec: Codec) -> None:
    multiple = {"nvfp4": 16, "fp8": 1, "int8_channel": 1, "fp8_block": 128, "int4_two_level": 128}.get(codec.name, 32)
    for in_features in [*range(2, 300, 2), 4304]:
        reason = codec.refusal(8, in_features)
        assert (reason is None) == (in_features % multiple == 0), in_features
        if reason is None:
            rounded = nearest_rounding(codec, torch.ones(1, in_features))
            assert codec.decode(codec.pack(rounded)).shape == (1, in_features)
        else:
            assert str(in_features) in reason and str(multiple) in reason


def test_nvfp4_and_nvfp4a16_share_one_codec_and_so_one_rounding() -> None:
    assert list(codecs_of([FormatName.NVFP4, FormatName.NVFP4A16, FormatName.BF16])) == ["nvfp4"]
    assert set(FORMATS) == set(FormatName)
