"""INT4A8 (W4A8): 4-bit integers with a BF16 scale per 128 columns; dynamic per-token E4M3 activations.

The tensors are INT4's. The kernel multiplies by E4M3 scales under one float32 scale per row, and vLLM makes both of the
stored ones, so that only scales that are such products are served as they are stored: these are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import VLLM, Format, Scaling, Served
from prismaquant_ray.formats.fp8 import FORMAT as FP8
from prismaquant_ray.formats.grids import E4M3_MAX, divided_by, round_e4m3
from prismaquant_ray.formats.int4 import Int4Codec
from prismaquant_ray.formats.packed_int import weight_scheme

WIDTH = 128
#: The smallest scale of a row that vLLM makes, 1 / (448 · 512); scales below 448 of it are kept to 2⁻⁹.
LEAST_OF_ROW = 1 / (E4M3_MAX * 512)
# The kernel has an eighth of each E4M3 scale, which from here on is exact.
_LEAST_SCALE = 2.0**-3


class TwoLevelInt4Codec(Int4Codec):
    """Integers −8…7 under scales e · c: e is E4M3, and 448 for the largest group of a row, c has four bits by row."""

    def __init__(self) -> None:
        super().__init__(4)
        self.name = "int4_two_level"
        self.widths = ()
        self.multiple = WIDTH

    def width(self, in_features: int) -> int:  # noqa: ARG002 - the kernel has this one
        """128 columns."""
        return WIDTH

    def nearest_scale(self, amax: Tensor, global_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        """e · c nearest to amax / 7.5."""
        return self._stored(amax, amax)

    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Tensor:  # noqa: ARG002
        """Each multiple, but for the largest group of a row, by whose scale vLLM finds c."""
        return self._stored(amax * multipliers.view(-1, *[1] * amax.dim()), amax)

    def _stored(self, wanted: Tensor, amax: Tensor) -> Tensor:
        """BF16 scales for groups of amax (…, O, G) that shall be scaled as those of `wanted` (…, O, G)."""
        largest = amax.amax(-1, keepdim=True)
        of_row = divided_by(divided_by(largest, self.grid_max), E4M3_MAX)
        # A mantissa of four bits, so that its products with E4M3 have eight, as BF16 has.
        rounded = ((of_row.view(torch.int32) + (1 << 19)) & -(1 << 20)).view(torch.float32)
        of_row = torch.where(largest == 0, 1.0, rounded.clamp(min=LEAST_OF_ROW))
        e = round_e4m3(divided_by(wanted, self.grid_max) / of_row).clamp_(min=_LEAST_SCALE)
        e = torch.where((amax == largest) & (rounded >= LEAST_OF_ROW), E4M3_MAX, e)
        return (e * of_row).to(torch.bfloat16)


CODEC = TwoLevelInt4Codec()


def _scheme(in_features: int) -> tuple[dict[str, Any], dict[str, Any]]:
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return weight_scheme(CODEC)(in_features)[0], activations


FORMAT = Format(
    name=FormatName.INT4A8,
    codec=CODEC,
    round_activation=FP8.round_activation,
    activation_codec=FP8.codec,
    activation_scaling=Scaling.TOKEN,
    compression="pack-quantized",
    scheme=_scheme,
    summary="4-bit integer weights, scales per 128; dynamic 8-bit float activations per token",
    letter="D",
    colours=("#a8c95f", "#1a2600"),
    multiples=(128, 128),
    served=Served(
        vllm_scheme="W4A8Fp8",
        loads_from=90,
        full_from=90,
        loads_to=90,
        shape_rule="in % 128, out % 128",
        conditions="CUTLASS on SM90; every other GPU refuses the repository when it loads it",
    ),
    experts_refused=f"vLLM {VLLM} has another kernel for experts, which nothing here could try",
)
