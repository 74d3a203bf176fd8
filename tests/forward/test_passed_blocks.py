"""Weights of an FP8 source: found again under its scales, whatever the dimensions, and only where that is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prismaquant_ray.formats.fp8_block import CODEC
from prismaquant_ray.forward.encode import Rounding, encode_group
from prismaquant_ray.forward.passed_blocks import passed_scales
from prismaquant_ray.forward.statistics import InputStatistics
from prismaquant_ray.layout import LinearSpec, Matrix
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store

FP8 = torch.float8_e4m3fn
NUMBERS = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127]


def codes(rows: int, columns: int, seed: int) -> Tensor:
    picked = torch.randint(len(NUMBERS), (rows, columns), generator=torch.Generator().manual_seed(seed))
    return NUMBERS[picked].view(FP8)


def source_of(directory: Path, tensors: dict[str, Tensor], block: int = 128) -> Checkpoint:
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (directory / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint(Store(directory))


def matrix_of(*shapes: tuple[int, int]) -> Matrix:
    linears = tuple(
        LinearSpec(name=name, out_features=rows, in_features=columns, sources=(f"{name}.weight",))
        for name, (rows, columns) in zip("ab", shapes, strict=False)
    )
    return Matrix(name="ab", input="x", linears=linears, parameters=tuple(f"{each.name}.weight" for each in linears))


def statistics(width: int) -> InputStatistics:
    unit = torch.eye(width)
    nothing = torch.zeros_like(unit)
    return InputStatistics(train=unit, holdout=nothing, train_tokens=1, holdout_tokens=0, amax=nothing[0])


def test_every_code_under_any_scale_is_found_again(tmp_path: Path) -> None:
    """In two fused matrices, of which the last ends within a block; of scales with any mantissa."""
    stored = {"a.weight": codes(256, 384, seed=0), "b.weight": codes(200, 384, seed=1)}
    scales = {
        name: torch.exp2(torch.rand(2, 3, generator=torch.Generator().manual_seed(place)) * 190 - 95)
        for place, name in enumerate(stored)
    }
    source = source_of(tmp_path, stored | {f"{name}_scale_inv": scale for name, scale in scales.items()})
    found = passed_scales(source, matrix_of((256, 384), (200, 384)))
    assert found is not None
    weights = [source.read([name])[name] for name in stored]
    encoded = encode_group(weights, CODEC, statistics(384), None, Rounding(gptq=None), found)
    for each, weight, name in zip(encoded, weights, stored, strict=True):
        packed = CODEC.pack(each.rounded)
        assert torch.equal(packed["weight"].view(torch.uint8), stored[name].view(torch.uint8))
        assert torch.equal(packed["weight_scale"], scales[name])
        assert torch.equal(CODEC.decode(packed), weight)
        assert each.figures.weight_mse == 0
    # Rounded afresh, under powers of two, they are other weights.
    (afresh, _) = encode_group(weights, CODEC, statistics(384), None, Rounding(gptq=None))
    assert not torch.equal(CODEC.decode(CODEC.pack(afresh.rounded)), weights[0])


@pytest.mark.parametrize("scale", [0.0, 2.0**-120, 2.0**115])
def test_scales_under_which_codes_cannot_be_found_do_not_pass(tmp_path: Path, scale: float) -> None:
    scales = torch.full((1, 1), scale)
    source = source_of(tmp_path, {"a.weight": codes(128, 128, seed=0), "a.weight_scale_inv": scales})
    assert passed_scales(source, matrix_of((128, 128))) is None


def test_other_blocks_and_partly_quantized_matrices_do_not_pass(tmp_path: Path) -> None:
    weight, scale = codes(128, 128, seed=0), torch.ones(1, 1)
    (tmp_path / "other").mkdir()
    other = source_of(tmp_path / "other", {"a.weight": weight, "a.weight_scale_inv": scale}, block=256)
    assert passed_scales(other, matrix_of((128, 128))) is None
    mixed = {"a.weight": weight, "a.weight_scale_inv": scale, "b.weight": torch.ones(128, 128).bfloat16()}
    source = source_of(tmp_path, mixed)
    assert passed_scales(source, matrix_of((128, 128), (128, 128))) is None
    assert passed_scales(source, matrix_of((128, 128))) is not None
