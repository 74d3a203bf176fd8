"""E2M1 codes, two per byte: shared by MXFP4 and NVFP4."""

from __future__ import annotations

from torch import Tensor

from prismaquant_ray.formats.base import Codec
from prismaquant_ray.formats.grids import E2M1, E2M1_MAX, pack_e2m1, unpack_e2m1


class E2m1Codec(Codec):
    """`weight_packed` U8 (O, I/2) and `weight_scale`; subclasses define the scale."""

    code_bits = 4
    grid_max = E2M1_MAX
    grid = E2M1

    def packed(self, values: Tensor) -> Tensor:
        """Two codes per byte, the even column in the low nibble."""
        return pack_e2m1(values)

    def unpacked(self, codes: Tensor) -> Tensor:
        """E2M1 values in float32."""
        return unpack_e2m1(codes)
