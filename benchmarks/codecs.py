"""Time to round, pack and decode a weight in every codec, in copies of the weight's own bytes.

    python -m benchmarks.codecs

A ratio of 10 means ten times as long as copying the BF16 source. Each repetition times the copy and then the
operation, and the median of their ratios is shown, so that other load on the machine cancels to first order.
`pack` rounds under given scales and packs, which is what `compress` of compressed-tensors does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from prismaquant_ray.formats import FORMATS, Format, FormatName, Rounded
from prismaquant_ray.formats.base import Tensors, grouped

SHAPE = (2048, 4096)
REPEATS = 15


def median_ratio(source: Tensor, operation: Callable[[], object]) -> float:
    """Median over repetitions of the time of `operation` over that of a copy of `source`."""
    target = torch.empty_like(source)
    target.copy_(source)
    operation()
    ratios = []
    for _ in range(REPEATS):
        start = perf_counter()
        target.copy_(source)
        copied = perf_counter()
        operation()
        ratios.append((perf_counter() - copied) / (copied - start))
    return statistics.median(ratios)


def ours(format_: Format, source: Tensor) -> tuple[Callable[[], Tensors], Callable[[], Tensor]]:
    """Packing under the nearest scales, and decoding."""
    codec = format_.codec
    assert codec is not None
    amax = grouped(source, SHAPE[1] // codec.width(SHAPE[1])).abs().amax(-1).float()
    global_scale = codec.global_scale(amax.max().item())
    scale = codec.nearest_scale(amax, global_scale)

    def pack() -> Tensors:
        factor = codec.scale_value(scale, global_scale).unsqueeze(-1)
        values = codec.round(grouped(source.float(), scale.shape[1]) / factor).flatten(1)
        return codec.pack(Rounded(values=values, scale=scale, global_scale=global_scale))

    packed = pack()
    return pack, lambda: codec.decode(packed)


def theirs(format_: Format, source: Tensor) -> tuple[Callable[[], Tensors], Callable[[], Tensor]]:
    """The same by compressed-tensors, from the same scales in float32."""
    assert format_.codec is not None and format_.scheme is not None
    weights, activations = format_.scheme(SHAPE[1])
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**activations) if activations else None,
    )
    compressor = BaseCompressor.get_value_from_registry(format_.compression)
    packed = ours(format_, source)[0]()
    # A one-level scale is given as its value, a two-level one as it is stored.
    one_level = format_.codec.global_scale(1.0) is None
    scale = packed["weight_scale"]
    state = {
        "weight": source.float(),
        "weight_scale": format_.codec.scale_value(scale, None) if one_level else scale.float(),
    }
    if not one_level:
        state["weight_global_scale"] = packed["weight_global_scale"]
    return lambda: compressor.compress(state, scheme), lambda: compressor.decompress(packed, scheme)["weight"]


def main() -> None:
    """Print one line a codec."""
    torch.set_num_threads(1)
    source = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows = {str(name): ours(f, source) for name, f in FORMATS.items() if f.codec and name != FormatName.NVFP4A16}
    for name in (FormatName.NVFP4, FormatName.MXFP8):
        rows[f"{name}, compressed-tensors"] = theirs(FORMATS[name], source)
    print(f"{SHAPE[0]}x{SHAPE[1]} BF16, one thread, torch {torch.__version__}; in copies of the source")
    print(f"{'codec':28} {'pack':>8} {'decode':>8}")
    for name, (pack, decode) in rows.items():
        print(f"{name:28} {median_ratio(source, pack):8.1f} {median_ratio(source, decode):8.1f}")


if __name__ == "__main__":
    main()
