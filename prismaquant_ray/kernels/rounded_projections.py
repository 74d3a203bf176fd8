"""What a candidate does to the loss of each token, with its inputs rounded on the way: everything is read once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Scaling
from prismaquant_ray.formats.grids import E4M3, E4M3_MAX
from prismaquant_ray.formats.int8 import LARGEST, LEAST_TOKEN
from prismaquant_ray.formats.nvfp4 import ZERO_SCALE
from prismaquant_ray.kernels.grid import constants, on_grid

# Rows of a program, and columns that it reads at a time.
_ROWS = 4
_COLUMNS = 256

_STATIC = tl.constexpr(int(Scaling.STATIC))
_POWER_OF_TWO = tl.constexpr(int(Scaling.POWER_OF_TWO))
_INTEGER = tl.constexpr(int(Scaling.INTEGER))
_LARGEST = tl.constexpr(LARGEST)
_LEAST = tl.constexpr(LEAST_TOKEN)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_E4M3_NORMAL = tl.constexpr(E4M3.smallest_normal)
_E4M3_STEP = tl.constexpr(E4M3.step)
_ZERO_SCALE = tl.constexpr(ZERO_SCALE)


def launch_rounded_projections(
    x: Tensor, difference: Tensor, grad_input: Tensor, input_scale: Tensor | None, name: str
) -> Tensor:
    """See `backward.price`."""
    spec = FORMATS[FormatName(name)]
    codec = spec.codec if spec.activation_codec is None else spec.activation_codec
    assert codec is not None
    rows, columns = x.shape
    scaling = spec.activation_scaling
    token = scaling in (None, Scaling.TOKEN, Scaling.INTEGER)
    found = torch.empty(2, rows, device=x.device)
    projections_kernel[triton.cdiv(rows, _ROWS),](
        x.contiguous(),
        difference.contiguous(),
        grad_input.contiguous(),
        # Another one is not read.
        x if input_scale is None else input_scale,
        found,
        rows,
        columns,
        SCALING=-1 if scaling is None else int(scaling),
        BY_TOKEN=scaling in (Scaling.TOKEN, Scaling.INTEGER),
        WIDTH=_COLUMNS if token else codec.width(columns),
        GRID_MAX=codec.grid_max,
        EXPONENT=int(math.log2(codec.grid_max)),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        **constants(codec),
        # The reference rounds products before it adds them.
        enable_fp_fusion=False,
    )
    return found


@triton.jit
def projections_kernel(
    x,
    difference,
    grad_input,
    input_scale,
    found,
    rows,
    columns,
    SCALING: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    WIDTH: tl.constexpr,
    GRID_MAX: tl.constexpr,
    EXPONENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SMALLEST: tl.constexpr,
    STEP: tl.constexpr,
):
    """x, difference and grad_input (rows, columns) and input_scale (1,); `found` (2, rows) is written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    place = tl.arange(0, COLUMNS)[None, :]
    amax = tl.zeros((ROWS,), tl.float32)
    if BY_TOKEN:
        for begin in range(0, columns, COLUMNS):
            at = row[:, None] * columns + begin + place
            part = tl.load(x + at, mask=there & (begin + place < columns), other=0.0)
            amax = tl.maximum(amax, tl.max(tl.abs(part), 1))
    weights = tl.zeros((ROWS,), tl.float32)
    activations = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, columns, COLUMNS):
        at = row[:, None] * columns + begin + place
        both = there & (begin + place < columns)
        inputs = tl.load(x + at, mask=both, other=0.0)
        change = tl.load(difference + at, mask=both, other=0.0)
        weights += tl.sum(inputs * change, 1)
        if SCALING >= 0:
            groups = tl.reshape(inputs, (ROWS, COLUMNS // WIDTH, WIDTH))
            of_group = amax[:, None] if BY_TOKEN else tl.max(tl.abs(groups), 2)
            scale = _activation_scale(of_group, input_scale, SCALING, GRID_MAX, EXPONENT)[:, :, None]
            if SCALING == _INTEGER:
                factor = tl.div_rn(tl.zeros_like(of_group) + _LARGEST, tl.maximum(of_group, _LEAST))
                scaled = groups * factor[:, :, None]
            else:
                scaled = tl.div_rn(groups, scale + tl.zeros_like(groups))
            rounded = on_grid(scaled, LOW, HIGH, SMALLEST, STEP) * scale
            away = tl.reshape(rounded, (ROWS, COLUMNS)) - inputs
            activations += tl.sum((change + tl.load(grad_input + at, mask=both, other=0.0)) * away, 1)
    tl.store(found + row, weights, mask=row < rows)
    tl.store(found + rows + row, activations, mask=row < rows)


@triton.jit
def _activation_scale(amax, input_scale, SCALING: tl.constexpr, GRID_MAX: tl.constexpr, EXPONENT: tl.constexpr):
    """The factor of each group by its amax: that of `Format.round_activation`, bit by bit."""
    if SCALING == _STATIC:
        divisor = tl.load(input_scale)
        wanted = tl.div_rn(amax, tl.zeros_like(amax) + GRID_MAX) * divisor
        stored = on_grid(wanted, -_E4M3_MAX, _E4M3_MAX, _E4M3_NORMAL, _E4M3_STEP)
        scale = tl.div_rn(tl.where(stored == 0, _ZERO_SCALE, stored), tl.zeros_like(amax) + divisor)
    elif SCALING == _POWER_OF_TWO:
        exponent = ((amax.to(tl.int32, bitcast=True) + (1 << 21)) >> 23) - EXPONENT
        scale = (tl.minimum(tl.maximum(exponent, 1), 254) << 23).to(tl.float32, bitcast=True)
    elif SCALING == _INTEGER:
        scale = tl.div_rn(amax, tl.zeros_like(amax) + _LARGEST)
    else:
        scale = tl.div_rn(amax, tl.zeros_like(amax) + GRID_MAX)
        scale = tl.where(scale == 0, 1.0, scale)
    return scale
