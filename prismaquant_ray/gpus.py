"""GPUs as their makers describe them: the rates at which products and bytes can go at most.

Figures are of data sheets, for dense products with sums in float32; no card was measured. What a server reaches is
less, and not the same share of every figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

__all__ = ["GPUS", "Gpu", "GpuName"]


class GpuName(StrEnum):
    """The names that users write in `allocation.limits.gpu`."""

    B200 = "b200"
    B300 = "b300"
    GB10 = "gb10"
    RTX_PRO_6000 = "rtx-pro-6000"
    RTX5090 = "rtx5090"
    H200 = "h200"
    H100 = "h100"
    L40S = "l40s"
    RTX4090 = "rtx4090"
    L4 = "l4"
    A100 = "a100"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A card's dense products in TFLOP/s by the bits of their operands, and its memory bandwidth in TB/s.

    `capability` is the CUDA compute capability (×10), which decides what a runtime has kernels for. Operands for which
    `products` has no figure are multiplied in the next wider type that has one.
    """

    capability: int
    products: Mapping[int, str]
    bandwidth: str

    def rate(self, bits: int) -> int:
        """Products of operands of so many bits, in FLOP/s."""
        return int(10**12 * Fraction(self.products[min(width for width in self.products if width >= bits)]))

    @property
    def bytes_per_second(self) -> Fraction:
        """Bytes that its memory delivers."""
        return 10**12 * Fraction(self.bandwidth)


#: By name. Decimal text, so that times are exact ratios of whole numbers.
GPUS: Mapping[GpuName, Gpu] = {
    # NVIDIA DGX B200 data sheet: of eight GPUs 144 PFLOP/s FP4 and 72 FP8 with sparsity, 64 TB/s.
    GpuName.B200: Gpu(capability=100, products={4: "9000", 8: "4500", 16: "2250"}, bandwidth="8"),
    # NVIDIA DGX B300 data sheet: of eight GPUs 108 PFLOP/s dense FP4, 72 FP8 with sparsity, 64 TB/s.
    GpuName.B300: Gpu(capability=103, products={4: "13500", 8: "4500", 16: "2250"}, bandwidth="8"),
    # NVIDIA DGX Spark data sheet: 1 PFLOP/s FP4 with sparsity, 273 GB/s; FP8 and BF16 are a half and a quarter of it.
    GpuName.GB10: Gpu(capability=121, products={4: "500", 8: "250", 16: "125"}, bandwidth="0.273"),
    # NVIDIA RTX PRO 6000 Blackwell: 4,000 AI TOPS, which are FP4 with sparsity, 1,792 GB/s; as above.
    GpuName.RTX_PRO_6000: Gpu(capability=120, products={4: "2000", 8: "1000", 16: "500"}, bandwidth="1.792"),
    # NVIDIA RTX Blackwell GPU architecture, table of the GeForce RTX 5090: FP8 and BF16 with sums in float32.
    GpuName.RTX5090: Gpu(capability=120, products={4: "1676", 8: "419", 16: "209.5"}, bandwidth="1.792"),
    # NVIDIA H200 data sheet, SXM: halves of the figures with sparsity.
    GpuName.H200: Gpu(capability=90, products={8: "1979", 16: "989.5"}, bandwidth="4.8"),
    # NVIDIA H100 data sheet, SXM.
    GpuName.H100: Gpu(capability=90, products={8: "1979", 16: "989.5"}, bandwidth="3.35"),
    # NVIDIA L40S data sheet.
    GpuName.L40S: Gpu(capability=89, products={8: "733", 16: "362"}, bandwidth="0.864"),
    # NVIDIA Ada GPU architecture, table of the GeForce RTX 4090: sums in float32.
    GpuName.RTX4090: Gpu(capability=89, products={8: "330.3", 16: "165.2"}, bandwidth="1.008"),
    # NVIDIA L4 data sheet: halves of the figures with sparsity.
    GpuName.L4: Gpu(capability=89, products={8: "242.5", 16: "121"}, bandwidth="0.3"),
    # NVIDIA A100 data sheet, SXM, 80 GB.
    GpuName.A100: Gpu(capability=80, products={16: "312"}, bandwidth="2.039"),
}
