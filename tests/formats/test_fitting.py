"""Which groups can take a format: where vLLM's loaders have no room for blocks, heads or experts, it is refused."""

from __future__ import annotations

import pytest

from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import refusal
from prismaquant_ray.layout import FusedGroup, LinearSpec, Matrix

F = FormatName


def matrix(name: str, *shapes: tuple[int, int], experts: int | None = None) -> Matrix:
    linears = tuple(
        LinearSpec(name=f"{name}.{part}", out_features=rows, in_features=columns, sources=(), experts=experts)
        for part, (rows, columns) in zip("abc", shapes, strict=False)
    )
    return Matrix(name=name, input="x", linears=linears, parameters=())


def group(*matrices: Matrix, head: bool = False) -> FusedGroup:
    return FusedGroup(name="g", matrices=matrices, head=head)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((256, 256), (128, 256)), None),
        (((1536, 256), (576, 256)), None),  # as DeepSeek-V3's: the last may end within a block
        (((576, 256), (1536, 256)), "out_features 576 of a fused matrix is not a multiple of 128"),
        (((100, 256),), None),
        (((128, 192),), "in_features 192 is not a multiple of 128"),
    ],
)
def test_blocks_of_fused_matrices_may_not_reach_into_the_next_one(
    shapes: tuple[tuple[int, int], ...], reason: str | None
) -> None:
    assert refusal(F.FP8_BLOCK, group(matrix("qkv", *shapes))) == reason
    assert refusal(F.FP8, group(matrix("qkv", *shapes))) is None


@pytest.mark.parametrize(("inner", "fits"), [(256, True), (192, False)])
def test_experts_need_whole_blocks_in_gate_and_up(inner: int, fits: bool) -> None:
    up = matrix("w13", (inner, 256), (inner, 256), experts=4)
    down = matrix("w2", (200, 256), experts=4)
    found = refusal(F.FP8_BLOCK, group(up, down))
    assert found == (None if fits else f"out_features {inner} of a fused matrix is not a multiple of 128")


def test_an_output_head_has_no_blocks() -> None:
    assert "output head" in str(refusal(F.FP8_BLOCK, group(matrix("lm_head", (512, 256)), head=True)))
    assert all(
        refusal(name, group(matrix("lm_head", (512, 256)), head=True)) is None for name in F if name != "FP8_BLOCK"
    )


def test_kernels_that_take_no_part_of_a_tile_refuse_its_shape() -> None:
    assert refusal(F.INT4A8, group(matrix("o", (192, 256)))) == "out_features 192 is not a multiple of 128"
    assert refusal(F.INT4A8, group(matrix("o", (256, 192)))) == "in_features 192 is not a multiple of 128"
    assert refusal(F.MXFP4A8, group(matrix("o", (192, 96)))) == "in_features 96 is not a multiple of 128"
    assert refusal(F.MXFP4A8, group(matrix("o", (192, 256)))) is None


def test_4_bit_weights_under_8_bit_activations_are_not_for_experts() -> None:
    experts = group(matrix("w13", (256, 256), (256, 256), experts=2), matrix("w2", (256, 256), experts=2))
    refused = {name for name in F if refusal(name, experts) is not None}
    assert refused == {F.INT4A8, F.MXFP4A8, F.NVFP4A16}


def test_every_format_says_what_serves_it() -> None:
    for spec in FORMATS.values():
        assert spec.served.conditions
        assert spec.served.loads_to is None or spec.served.loads_to >= spec.served.loads_from
    assert FORMATS[F.INT8].served.needs == "SM75 to SM90"
    assert FORMATS[F.INT4A8].served.needs == "SM90 only"
