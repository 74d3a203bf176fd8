"""Second moments of a dense input by one product: of BF16 inputs exact products, added in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def launch_add_moments(sums: Tensor, rows: Tensor) -> None:
    """See `forward.statistics`."""
    if rows.dtype == torch.float32:
        sums.addmm_(rows.T, rows)
    else:
        sums.add_(torch.mm(rows.T, rows, out_dtype=torch.float32))
