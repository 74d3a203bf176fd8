"""Second moments of the inputs of all experts in one launch: a program multiplies two strips of an expert's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a strip, and rows that are multiplied at a time.
_COLUMNS = 64
_ROWS = 32


def launch_expert_moments(x: Tensor, rows: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """See `forward.statistics`."""
    columns = x.shape[1]
    strips = triton.cdiv(columns, _COLUMNS)
    sums = torch.empty(len(counts), columns, columns, device=x.device)
    moments_kernel[strips * (strips + 1) // 2, len(counts)](
        x.contiguous(), rows.contiguous(), starts, counts.contiguous(), sums, columns, COLUMNS=_COLUMNS, ROWS=_ROWS
    )
    return sums


@triton.jit
def moments_kernel(x, rows, starts, counts, sums, columns, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """x (R, columns), rows (R,), starts and counts (E,); sums (E, columns, columns) are written, both triangles."""
    # The pair of strips below and above the diagonal, from its number in the triangle.
    first, second = 0, tl.program_id(0)
    while second > first:
        second -= first + 1
        first += 1
    expert = tl.program_id(1).to(tl.int64)
    start, count = tl.load(starts + expert), tl.load(counts + expert)
    upper = first * COLUMNS + tl.arange(0, COLUMNS)
    lower = second * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for begin in range(0, count, ROWS):
        there = begin + tl.arange(0, ROWS) < count
        row = tl.load(rows + start + begin + tl.arange(0, ROWS), mask=there, other=0).to(tl.int64)
        at = x + row[:, None] * columns
        one = tl.load(at + upper[None, :], mask=there[:, None] & (upper < columns)[None, :], other=0.0)
        other = tl.load(at + lower[None, :], mask=there[:, None] & (lower < columns)[None, :], other=0.0)
        total = tl.dot(tl.trans(one), other, acc=total, input_precision="ieee")
    both = (upper < columns)[:, None] & (lower < columns)[None, :]
    sums += expert * columns * columns
    tl.store(sums + upper[:, None] * columns + lower[None, :], total, mask=both)
    tl.store(sums + lower[None, :] * columns + upper[:, None], total, mask=both)
