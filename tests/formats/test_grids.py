"""The number grids, against a search through the whole grid and against compressed-tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization.utils import generate_mx_scales
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismaquant_ray.formats.grids import (
    E2M1_MAX,
    E4M3_MAX,
    e8m0_at_least,
    e8m0_value,
    pack_e2m1,
    round_e2m1,
    round_e4m3,
    unpack_e2m1,
)
from prismaquant_ray.formats.mx import runtime_exponent
from tests.reference.codecs import E2M1, E4M3, critical_points, nearest, smallest_power_of_two_at_least

ROUNDINGS = pytest.mark.parametrize(("round_", "magnitudes"), [(round_e2m1, E2M1), (round_e4m3, E4M3)])
Rounding = Callable[[Tensor], Tensor]
POSITIVE_NORMAL = st.floats(2.0**-126, 2.0**126, width=32)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


@ROUNDINGS
def test_the_nearest_value_is_chosen_at_every_tie_and_one_ulp_beside_it(
    round_: Rounding, magnitudes: Sequence[float]
) -> None:
    x = critical_points(magnitudes)
    expected = torch.tensor([nearest(v, magnitudes) for v in x.tolist()])
    assert torch.equal(bits(round_(x)), bits(expected))


@ROUNDINGS
@given(x=st.floats(width=32, allow_nan=False))
@settings(deadline=None)
def test_the_nearest_value_is_chosen_anywhere(round_: Rounding, magnitudes: Sequence[float], x: float) -> None:
    assert torch.equal(bits(round_(torch.tensor([x]))), bits(torch.tensor([nearest(x, magnitudes)])))


@ROUNDINGS
def test_grid_values_stay_and_the_argument_is_not_modified(round_: Rounding, magnitudes: Sequence[float]) -> None:
    grid = torch.tensor([*magnitudes, *(-v for v in magnitudes)])
    assert torch.equal(bits(round_(grid)), bits(grid))
    x = torch.linspace(-500, 500, 1001)
    before = x.clone()
    round_(x)
    assert torch.equal(x, before)


def test_ties_of_e2m1_go_to_the_even_code_and_not_away_from_zero() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0])
    assert round_e2m1(x).tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -4]


@ROUNDINGS
def test_a_view_that_is_not_contiguous_rounds_alike(round_: Rounding, magnitudes: Sequence[float]) -> None:
    x = torch.randn(32, 48).mul(magnitudes[-1] / 2)
    assert torch.equal(round_(x.t()), round_(x).t())
    assert torch.equal(round_(x[:, ::3]), round_(x)[:, ::3])


def test_every_byte_unpacks_as_in_compressed_tensors_and_packs_to_itself() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    values = unpack_e2m1(every)
    assert torch.equal(bits(values), bits(unpack_fp4_from_uint8(every, 4, 128, dtype=torch.float32)))
    assert torch.equal(pack_e2m1(values), every)
    assert torch.equal(pack_fp4_to_uint8(values), every)


def test_the_even_column_is_the_low_nibble_and_negative_zero_has_a_code() -> None:
    assert pack_e2m1(torch.tensor([[0.5, -6.0, 0.0, -0.0]])).tolist() == [[0xF1, 0x80]]


@given(x=POSITIVE_NORMAL)
@settings(deadline=None)
def test_the_scale_is_the_smallest_power_of_two_that_is_not_below(x: float) -> None:
    exponent = e8m0_at_least(torch.tensor([x]))
    assert exponent.item() == smallest_power_of_two_at_least(x)
    value = e8m0_value(exponent).item()
    assert value >= x > value / 2


def test_a_power_of_two_is_its_own_scale_and_the_next_number_takes_the_next() -> None:
    exponent = torch.arange(1, 254, dtype=torch.uint8)
    power = e8m0_value(exponent)
    assert power.tolist() == [2.0 ** (e - 127) for e in exponent.tolist()]
    assert torch.equal(e8m0_at_least(power), exponent)
    assert torch.equal(e8m0_at_least(power.nextafter(torch.tensor(math.inf))), exponent + 1)
    below = power.nextafter(torch.tensor(0.0))
    assert torch.equal(e8m0_at_least(below), exponent)


@pytest.mark.parametrize("tiny", [0.0, 2.0**-149, 1e-40, 2.0**-126])
def test_scales_do_not_underflow(tiny: float) -> None:
    assert e8m0_value(e8m0_at_least(torch.tensor([tiny]))).item() == 2.0**-126


@pytest.mark.parametrize("grid_max", [E2M1_MAX, E4M3_MAX])
@given(amax=st.floats(0, 2.0**127, width=32))
@example(amax=448 * 2.0**3).via("fits exactly")
@example(amax=448 * (1 + 2.0**-23)).via("one ulp too large")
@settings(deadline=None)
def test_the_smallest_scale_that_does_not_clip(grid_max: float, amax: float) -> None:
    scale = e8m0_value(e8m0_at_least(torch.tensor([amax]) / grid_max)).item()
    assert amax <= scale * grid_max
    assert scale == 2.0**-126 or amax > scale / 2 * grid_max


@pytest.mark.parametrize(("num_bits", "grid_max"), [(4, E2M1_MAX), (8, E4M3_MAX)])
def test_the_runtime_exponent_is_that_of_compressed_tensors(num_bits: int, grid_max: float) -> None:
    # Both ends of every binade and of the step at mantissa 1.75, and a walk through all float32 between.
    smallest = 2.0 ** (int(math.log2(grid_max)) - 126)
    powers = 2.0 ** torch.arange(math.log2(smallest), 127)
    edges = torch.cat([m * powers for m in (1.0, 1.0 + 2**-23, 1.75 - 2**-23, 1.75, 1.75 + 2**-23, 2.0 - 2**-23)])
    first, last = (torch.tensor(v).view(torch.int32).item() for v in (smallest, 1.75 * 2.0**127))
    walk = torch.arange(first, last, 9973, dtype=torch.int32).view(torch.float32)
    amax = torch.cat((edges, walk))
    assert torch.equal(runtime_exponent(amax, grid_max).float(), generate_mx_scales(amax, num_bits))


@pytest.mark.parametrize("grid_max", [E2M1_MAX, E4M3_MAX])
def test_the_runtime_exponent_stays_in_range_where_compressed_tensors_leaves_it(grid_max: float) -> None:
    # Its exponent of zero means 2⁻¹²⁷, and its scale for the top quarter binade is infinite.
    amax = torch.tensor([0.0, 2.0**-149, 2.0**-126, torch.finfo(torch.float32).max])
    scale = e8m0_value(runtime_exponent(amax, grid_max))
    assert scale[:3].tolist() == [2.0**-126] * 3
    assert scale[3].item() == 2.0 ** (128 - int(math.log2(grid_max)))
