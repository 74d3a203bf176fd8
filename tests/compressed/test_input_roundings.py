"""Inputs of quantized Linears are rounded as compressed-tensors says, number by number."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from prismaquant_ray.compressed.activations import input_rounding
from prismaquant_ray.formats import FORMATS, FormatName
from tests.foreign_repositories import INT8, change, make_compressed, scheme, stored, view_of
from tests.reference.codecs import E4M3, nearest
from tests.reference.integers import nearest_integer
from tests.tiny import make_checkpoint


def inputs() -> Tensor:
    """Rows of zeros, of one sign, with an outlier, and ordinary ones."""
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    x[1], x[2] = 0, x[2].abs()
    x[3, 5] = 300.0
    x[4] *= 1e-4
    return x


def rounded(x: Tensor, scale: Tensor, zero: Tensor, grid: str) -> Tensor:
    """One number after the other; the scale and the zero point in float32, as they are stored."""
    result = torch.empty_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            place = x[i, j] / scale[i, j]
            if grid == "int":
                code = nearest_integer(Fraction(float(place + zero[i, j])), -128, 127) - int(zero[i, j])
            else:
                code = nearest(float(place), E4M3)
            result[i, j] = torch.tensor(float(code)) * scale[i, j]
    return result


def by_token_asymmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    return scale, (-128 - low / scale).nan_to_num(0).clamp(-128, 127).round()


def by_group(x: Tensor) -> tuple[Tensor, Tensor]:
    amax = x.unflatten(1, (-1, 32)).abs().amax(2).repeat_interleave(32, dim=1)
    return amax / 448, torch.zeros_like(x)


@pytest.mark.parametrize(
    ("arguments", "scales"),
    [
        ({**INT8, "strategy": "token", "symmetric": False}, by_token_asymmetric),
        ({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}, by_group),
    ],
)
def test_dynamic_inputs_are_rounded_row_by_row(
    arguments: dict[str, Any], scales: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    rounding = input_rounding(QuantizationArgs(**arguments, dynamic=True), None, {})
    x = inputs()
    scale, zero = (part.expand_as(x) for part in scales(x))
    wanted = torch.where(scale == 0, 0, rounded(x, torch.where(scale == 0, 1, scale), zero, arguments["type"]))
    assert torch.equal(rounding(x), wanted)
    assert torch.equal(rounding(x.view(1, 7, 1, 64)), wanted.view(1, 7, 1, 64))
    assert rounding(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(rounding(x[2:3]), wanted[2:3])


@pytest.mark.parametrize("zero", [None, -37])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_static_inputs_are_rounded_under_the_stored_scale(zero: int | None, shape: tuple[int, ...]) -> None:
    x = inputs()
    kinds = [{**INT8, "symmetric": zero is None}, *([{"num_bits": 8, "type": "float"}] if zero is None else [])]
    for kind in kinds:
        static = {"input_scale": torch.full(shape, 0.0213).bfloat16()}
        if zero is not None:
            static["input_zero_point"] = torch.full(shape, zero, dtype=torch.int8)
        rounding = input_rounding(QuantizationArgs(**kind, strategy="tensor"), None, static)
        scale = static["input_scale"].float().expand_as(x)
        assert torch.equal(rounding(x), rounded(x, scale, torch.full_like(x, zero or 0), kind["type"]))


def test_a_divisor_is_the_modules_own(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama_untied")
    repository = make_compressed(source, tmp_path / "repository", scheme("NVFP4"))
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    change(repository, {f"{first}.input_global_scale": torch.tensor([31.0])})
    roundings = view_of(repository).roundings()
    round_activation = FORMATS[FormatName.NVFP4].round_activation
    assert round_activation is not None
    for name in (first, second):
        divisor = stored(repository, name)["input_global_scale"]
        assert torch.equal(roundings[name](inputs()), round_activation(inputs(), divisor))
    assert not torch.equal(roundings[first](inputs()), roundings[second](inputs()))
