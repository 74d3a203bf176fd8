"""GPTQ's columns in one launch: a program takes rows through every column.

Where the reference pushes errors on to later columns, a program fetches those of all earlier columns when a block of
columns begins, so that it writes each of them once. Its rows' errors lie in global memory, in cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismaquant_ray.formats import codec_named
from prismaquant_ray.kernels.grid import constants, on_grid

# Columns of a block, which are rounded one by one, and rows of a program; tl.dot takes no fewer than 16.
_COLUMNS = 32
_ROWS = 16


def launch_gptq_values(weight: Tensor, factors: Tensor, upper: Tensor, order: Tensor, codec: str) -> Tensor:
    """See `forward.gptq`."""
    experts, rows, columns = weight.shape
    values = torch.empty_like(weight, memory_format=torch.contiguous_format)
    # By column: neighbouring rows are read and written together.
    errors = torch.empty(experts, columns, rows, device=weight.device)
    gptq_kernel[triton.cdiv(rows, _ROWS), experts](
        weight.contiguous(),
        factors.contiguous(),
        upper.contiguous(),
        order.contiguous(),
        errors,
        values,
        rows,
        columns,
        factors.shape[2],
        COLUMNS=_COLUMNS,
        ROWS=_ROWS,
        **constants(codec_named(codec)),
        # The reference rounds products before it adds them.
        enable_fp_fusion=False,
    )
    return values


@triton.jit
def gptq_kernel(
    weight,
    factors,
    upper,
    order,
    errors,
    values,
    rows,
    columns,
    groups,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SMALLEST: tl.constexpr,
    STEP: tl.constexpr,
):
    """weight and values (E, rows, columns), factors (E, rows, groups), upper (E, columns, columns), order (E, columns).

    `errors` (E, columns, rows) is memory that the kernel writes ΔW to, columns in the order of visits.
    """
    expert = tl.program_id(1).to(tl.int64)
    weight += expert * rows * columns
    values += expert * rows * columns
    errors += expert * rows * columns
    factors += expert * rows * groups
    upper += expert * columns * columns
    order += expert * columns
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    place = tl.arange(0, COLUMNS)
    width = columns // groups
    for begin in range(0, columns, COLUMNS):
        inside = begin + place < columns
        both = there[:, None] & inside[None, :]
        visited = tl.load(order + begin + place, mask=inside, other=0)
        at = row[:, None] * columns + visited[None, :]
        scale = tl.load(factors + row[:, None] * groups + (visited // width)[None, :], mask=both, other=1.0)
        # Of columns that are rounded, `target` holds grid values and `delta` errors; of others targets and weights.
        delta = tl.load(weight + at, mask=both, other=0.0)
        target = delta
        for before in range(0, begin, COLUMNS):
            earlier = (before + place).to(tl.int64)
            fetched = tl.load(errors + earlier[None, :] * rows + row[:, None], mask=there[:, None], other=0.0)
            share = upper + earlier[:, None] * columns + (begin + place)[None, :]
            target = tl.dot(
                fetched, tl.load(share, mask=inside[None, :], other=0.0), acc=target, input_precision="ieee"
            )
        for column in range(COLUMNS):
            share = upper + (begin + column) * columns + begin + place
            pushed = tl.load(share, mask=(place > column) & inside, other=0.0)
            target, delta = _round_column(target, delta, scale, pushed, place == column, LOW, HIGH, SMALLEST, STEP)
        tl.store(values + at, target, mask=both)
        tl.store(errors + (begin + place).to(tl.int64)[None, :] * rows + row[:, None], delta, mask=both)
        # Other threads of this program read these errors for the next block.
        tl.debug_barrier()


@triton.jit
def _round_column(
    target,
    delta,
    scale,
    pushed,
    column,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SMALLEST: tl.constexpr,
    STEP: tl.constexpr,
):
    """Round the one `column` (COLUMNS,) of a block; `pushed` (COLUMNS,) of its error reaches the others."""
    here = column[None, :]
    factor = tl.sum(tl.where(here, scale, 0.0), 1)
    value = on_grid(tl.div_rn(tl.sum(tl.where(here, target, 0.0), 1), factor), LOW, HIGH, SMALLEST, STEP)
    error = tl.sum(tl.where(here, delta, 0.0), 1) - value * factor
    target = tl.where(here, value[:, None], target + error[:, None] * pushed[None, :])
    return target, tl.where(here, error[:, None], delta)
