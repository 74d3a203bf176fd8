"""Kernels against the references in torch that define their results, in Triton's interpreter: bit by bit.

Where sums are exact in float32, because all numbers are small multiples of powers of two, another order changes no bit,
so every difference would be a mistake. On other numbers sums may differ in their last bit; values and scales, which are
rounded from them, did not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prismaquant_ray.backward.price import rounded_projections
from prismaquant_ray.errors import ResourceError
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formats.base import Codec
from prismaquant_ray.formats.nvfp4 import divisor
from prismaquant_ray.forward.gptq import Gptq, factorize, gptq_values
from prismaquant_ray.forward.scale_search import ScaleSearch, nearest, round_scaled, search_scales
from prismaquant_ray.forward.statistics import expert_moments
from prismaquant_ray.kernels import check_gpu
from prismaquant_ray.kernels import launcher as kernel
from tests.ray_cluster import ROOT

pytestmark = pytest.mark.device

CODECS = list(codecs_of(FORMATS).values())
EACH_CODEC = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
# The interpreter is slow: a failure is not looked for in smaller examples.
FEW = settings(max_examples=8, phases=[Phase.explicit, Phase.generate])


def shaped(codec: Codec, rows: int, groups: int) -> tuple[int, int]:
    """Rows and columns of a matrix of about as many groups; a whole row where that is one."""
    if codec.multiple == 128:
        groups = min(groups, 2)  # the interpreter's time
    return rows, groups * (codec.multiple if codec.multiple > 1 else 24)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def divisor_of(codec: Codec, weight: Tensor) -> Tensor | None:
    return codec.global_scale(weight.abs().amax((1, 2)).view(-1, 1, 1))


def factors_of(codec: Codec, weight: Tensor) -> Tensor:
    start = nearest(weight, codec, divisor_of(codec, weight))
    return codec.scale_value(start.scale, start.global_scale)


@EACH_CODEC
def test_every_value_and_every_tie_is_rounded_as_the_codec_does(codec: Codec) -> None:
    values = codec.round(torch.linspace(-codec.grid_max * 1.2, codec.grid_max * 1.2, 20_001)).unique()
    ties = (values[1:] + values[:-1]) / 2
    around = torch.cat([values, ties, ties.nextafter(values[1:]), ties.nextafter(values[:-1])])
    beyond = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, torch.inf, -torch.inf])
    x = torch.cat([around, -around, beyond]).unsqueeze(1)
    found = kernel("round_scaled")(x, torch.ones_like(x), codec.name)
    assert torch.equal(found.view(torch.int32), codec.round(x).view(torch.int32))


@EACH_CODEC
@FEW
@given(rows=st.integers(1, 40), groups=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_rounding_under_scales_is_the_reference(codec: Codec, rows: int, groups: int, seed: int) -> None:
    weight = drawn(1, *shaped(codec, rows, groups), seed=seed)
    factors = factors_of(codec, weight)
    found = kernel("round_scaled")(weight[0], factors[0], codec.name)
    assert torch.equal(found, round_scaled(weight[0], factors[0], codec.name))


@EACH_CODEC
@FEW
@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 33),
    groups=st.integers(1, 4),
    grid=st.integers(1, 16),
    seed=st.integers(0, 2**31),
)
def test_the_search_finds_the_scales_of_the_reference_where_sums_are_exact(
    codec: Codec, experts: int, rows: int, groups: int, grid: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shaped(codec, rows, groups)
    # Multiples of ¼ whose largest fits the grid without a scale, under scales that are multiples of 1/16.
    reach = int(4 * codec.grid_max)
    weight = torch.randint(-reach, reach + 1, (experts, rows, columns), generator=generator) / 4
    weight[..., :: codec.width(columns)] = codec.grid_max
    weight[0, 0] = 0.0
    multipliers = torch.arange(17 - grid, 17) / 16
    divisor = None if codec.global_scale(1.0) is None else torch.ones(experts, 1, 1)
    importance = torch.randint(0, 4, (experts, columns), generator=generator).float()
    arguments = (weight, divisor, importance, multipliers, codec.name)
    assert _same(kernel("search_scales")(*arguments), search_scales(*arguments))


@EACH_CODEC
@pytest.mark.parametrize("experts", [1, 2])
def test_the_search_finds_the_scales_of_the_reference_for_any_weights(codec: Codec, experts: int) -> None:
    weight = drawn(experts, *shaped(codec, 24, 6), seed=3) * 0.02
    importance = drawn(experts, weight.shape[2], seed=4).square() + 0.1
    arguments = (weight, divisor_of(codec, weight), importance, ScaleSearch().multipliers(codec).float(), codec.name)
    assert _same(kernel("search_scales")(*arguments), search_scales(*arguments))


@EACH_CODEC
@FEW
@given(experts=st.integers(1, 3), rows=st.integers(1, 35), groups=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_gptq_has_the_values_of_the_reference_where_sums_are_exact(
    codec: Codec, experts: int, rows: int, groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = shaped(codec, rows, groups)[1]
    # Multiples of ¼ within the grid, so that errors are multiples of ¼; one in 16 is pushed on, with either sign.
    reach = int(3 * codec.grid_max)
    weight = torch.randint(-reach, reach + 1, (experts, rows, columns), generator=generator) / 4
    order = torch.stack([torch.randperm(columns, generator=generator) for _ in range(experts)])
    pushed = torch.randint(-16, 17, (experts, columns, columns), generator=generator)
    upper = torch.where(pushed.abs() == 1, pushed, 0.0).triu(1) + torch.eye(columns)
    factors = torch.ones(experts, rows, factors_of(codec, weight).shape[2])
    arguments = (weight, factors, upper, order, codec.name)
    assert torch.equal(kernel("gptq_values")(*arguments), gptq_values(*arguments))


def distance_to_tie(
    weight: Tensor,
    factors: Tensor,
    upper: Tensor,
    order: Tensor,
    found: Tensor,
    expected: Tensor,
    expert: int,
    row: int,
) -> float:
    """How far from a tie the exact sum is where a row first parts from the reference, in float32's last places."""
    visits, (weight, found, expected) = (
        order[expert],
        (each[expert, row].double() for each in (weight, found, expected)),
    )
    factors = factors[expert, row].double().repeat_interleave(len(weight) // factors.shape[2])
    place = int((found != expected)[visits].nonzero()[0])
    column, before = visits[place], visits[:place]
    pushed = (weight - expected * factors)[before] * upper[expert, :place, place].double()
    quotient = (weight[column] + pushed.sum()) / factors[column]
    last_place = quotient.float().abs() * 2.0**-23
    return float(((found[column] + expected[column]) / 2 - quotient).abs() / last_place)


@EACH_CODEC
@pytest.mark.parametrize(("experts", "rows", "columns"), [(1, 40, 192), (2, 17, 96)])
def test_gptq_has_the_values_of_the_reference_for_any_weights(
    codec: Codec, experts: int, rows: int, columns: int
) -> None:
    columns = columns if codec.refusal(rows, columns) is None else 128
    weight = drawn(experts, rows, columns, seed=5) * 0.02
    x = drawn(experts, 600, columns, seed=6) @ (torch.eye(columns) + 0.2 * drawn(columns, columns, seed=7))
    factor = factorize(x.mT @ x, Gptq())
    arguments = (weight, factors_of(codec, weight), factor.upper, factor.order, codec.name)
    found, expected = kernel("gptq_values")(*arguments), gptq_values(*arguments)
    parted = (found != expected).any(-1).nonzero().tolist()
    # One sum of 7,680 lies at a tie of INT8's 256 levels, nearer than float32 tells; another order of its terms gives
    # the other level there, and the rest of that row follows it.
    assert len(parted) <= (1 if codec.name == "int8_channel" else 0)
    for expert, row in parted:
        assert distance_to_tie(*arguments[:4], found, expected, expert, row) < 0.1
    assert not torch.equal(
        found, round_scaled(weight.flatten(0, 1), arguments[1].flatten(0, 1), codec.name).view_as(found)
    )


@FEW
@given(
    columns=st.sampled_from([8, 64, 72]),
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    exact=st.booleans(),
    seed=st.integers(0, 2**31),
)
# Triton's interpreter takes the bits of BF16 numbers for integers where it multiplies matrices.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_moments_of_experts_are_those_of_the_reference(
    dtype: torch.dtype, columns: int, counts: list[int], exact: bool, seed: int
) -> None:
    x = drawn(sum(counts) + 3, columns, seed=seed)
    x = (x * 4).round().to(dtype) if exact else x.to(dtype)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    own = torch.tensor(counts)
    arguments = (x, rows, own.cumsum(0) - own + 3, own)
    found, expected = kernel("expert_moments")(*arguments), expert_moments(*arguments)
    if exact:
        assert torch.equal(found, expected)
    magnitudes = expert_moments(x.abs(), *arguments[1:])
    assert ((found - expected).abs() <= 1e-5 * magnitudes).all()


def priced(name: FormatName, rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, D, g W (rows, columns) and the input's scale; x has a row of zeros, and sizes that clip."""
    x, difference, grad_input = (drawn(rows, columns, seed=seed + place) for place in range(3))
    x *= torch.logspace(-3, 3, rows).unsqueeze(1)
    x[0] = 0.0
    scale = divisor(x.abs().max() / 4, 2.0) if FORMATS[name].static_input_scale else None
    return x, difference, grad_input, scale


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [32, 288])
def test_every_input_is_rounded_as_the_format_does(name: FormatName, columns: int) -> None:
    if FORMATS[name].codec is None:
        return
    if name in (FormatName.FP8_BLOCK, FormatName.MXFP4A8):
        columns *= 4  # whole groups of 128
    x, _, _, scale = priced(name, columns + 1, columns, seed=8)
    # One column of each row is looked at, so there is nothing to add.
    one = torch.eye(columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(9))]
    one = torch.cat([one[:1], one])
    arguments = (x, torch.zeros_like(x), one, scale, name)
    assert torch.equal(kernel("rounded_projections")(*arguments), rounded_projections(*arguments))


@pytest.mark.parametrize("name", FORMATS)
def test_projections_are_those_of_the_reference(name: FormatName) -> None:
    if FORMATS[name].codec is None:
        return
    x, difference, grad_input, scale = priced(name, 9, 512, seed=10)
    found = kernel("rounded_projections")(x, difference, grad_input, scale, name)
    reference = rounded_projections(x, difference, grad_input, scale, name)
    terms = torch.stack([(x * difference).abs().sum(-1), (x * (difference + grad_input)).abs().sum(-1)])
    assert ((found - reference).abs() <= 1e-6 * terms).all()
    assert bool(found[1].any()) == (FORMATS[name].round_activation is not None)


_COMPILED = """
import json, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prismaquant_ray.formats import codec_named
from prismaquant_ray.kernels import grid
from prismaquant_ray.kernels.expert_moments import moments_kernel
from prismaquant_ray.kernels.gptq_values import gptq_kernel
from prismaquant_ray.kernels.round_scaled import round_kernel
from prismaquant_ray.kernels.rounded_projections import projections_kernel
from prismaquant_ray.kernels.search_scales import search_kernel

PRICED = {"GRID_MAX": 6.0, "EXPONENT": 2, "ROWS": 4, "COLUMNS": 256}
SIGNATURES = [
    (gptq_kernel, "*fp32 *fp32 *fp32 *i64 *fp32 *fp32 i32 i32 i32", {"COLUMNS": 32, "ROWS": 16}),
    *(
        (search_kernel, "*fp32 *fp32 *fp32 *i64 i32 i32 i32 i32", {"WIDTH": width, "AT_ONCE": 2048 // width})
        for width in (16, 32, 128)
    ),
    *(
        (moments_kernel, f"{type} *i64 *i64 *i64 *fp32 i32", {"COLUMNS": 64, "ROWS": 32})
        for type in ("*fp32", "*bf16")
    ),
    (round_kernel, "*fp32 *fp32 *fp32 i32 i32", {"AT_ONCE": 2048}),
    *(
        (
            projections_kernel,
            "*fp32 *fp32 *fp32 *fp32 *fp32 i32 i32",
            {"SCALING": scaling, "BY_TOKEN": scaling in (2, 4), "WIDTH": width, **PRICED},
        )
        for scaling, width in ((-1, 256), (0, 16), (1, 32), (2, 256), (3, 128), (4, 256))
    ),
]
result = []
for kernel, types, constants in SIGNATURES:
    if "LOW" in kernel.arg_names:
        constants = constants | grid.constants(codec_named("nvfp4"))
    names = kernel.arg_names
    signature = dict(zip(names, types.split() + ["constexpr"] * len(constants), strict=True))
    for capability in (80, 90, 100):
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(
            ASTSource(kernel, signature, constants), target=target, options={"enable_fp_fusion": False}
        )
        text, rounds = compiled.asm["ptx"], "LOW" in constants and constants.get("SCALING") != -1
        counts = {word: text.count(word) for word in ("div.rn.f32", "div.full.f32", "ld.local", "st.local")}
        size, shared = len(compiled.asm["cubin"]), compiled.metadata.shared
        result.append([kernel.__name__, capability, size, shared, rounds, counts])
print(json.dumps(result))
"""


def test_every_kernel_compiles_for_every_generation_of_gpu_with_exact_divisions() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert len(found) == 13 * 3
    for name, capability, size, shared, rounds, counts in found:
        assert size > 0, (name, capability)
        assert shared <= 48 << 10, "more shared memory than every GPU gives a program"
        assert (counts["div.rn.f32"] > 0) == rounds, "the reference divides exactly"
        assert counts["div.full.f32"] == counts["ld.local"] == counts["st.local"] == 0, (name, capability, counts)


def test_a_gpu_that_kernels_cannot_be_compiled_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_gpu()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ResourceError, match="has a GPU but not Triton"):
        check_gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ResourceError, match=r"has compute capability 7\.5; kernels need 8\.0"):
        check_gpu()


def _same(found: Tensor, expected: Tensor) -> bool:
    """Bit by bit; float8 has no comparison."""
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )
