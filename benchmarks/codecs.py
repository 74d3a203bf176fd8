"""Time to encode and decode a weight in every codec, in copies of the BF16 weight: `python -m benchmarks.codecs`.

`encode` rounds under given scales and packs, which is what `compress` of compressed-tensors does; 64 rows at a time.
Each repetition times a copy of the weight and then the operation, and shown is the median of their ratios, so that
other load on the machine cancels to first order. `copy` is that ratio. `bytes` is the ratio to a copy of as many bytes
as an ideal kernel would read and write: a copy moves 4 bytes a weight, a codec 2 and its codes and scales.

Eager torch makes a pass with each operation, most of which find their data in cache: 11 to encode MXFP8 (to float32,
division, six of the rounding, to its place, to E4M3, to its place), 15 for NVFP4, and four to decode (codes to 32 bits,
to values, times the scale, to BF16). Codes and decoded weights are checked to be compressed-tensors'. Figures go to
benchmarks/results/codecs.json.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from time import perf_counter

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from benchmarks.results import save
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Format, grouped
from prismaquant_ray.forward.scale_search import round_with

SHAPE = (2048, 4096)
ROWS = 64
REPEATS = 25
Operations = tuple[Callable[[], object], Callable[[], object]]


def ratio(source: Tensor, operation: Callable[[], object]) -> float:
    """Median over repetitions of the time of `operation` over that of a copy of `source`."""
    target = torch.empty_like(source)
    target.copy_(source)
    operation()
    found = []
    for _ in range(REPEATS):
        start = perf_counter()
        target.copy_(source)
        copied = perf_counter()
        operation()
        found.append((perf_counter() - copied) / (copied - start))
    return statistics.median(found)


def cases(format_: Format, source: Tensor) -> tuple[Operations, Operations]:
    """Encoding under the nearest scales and decoding: ours, and compressed-tensors' from the same scales."""
    codec = format_.codec
    assert codec is not None and format_.scheme is not None
    amax = grouped(source, SHAPE[1] // codec.width(SHAPE[1])).abs().amax(-1).float()
    global_scale = codec.global_scale(amax.max().item())
    scale = codec.nearest_scale(amax, global_scale)
    packed = codec.pack(round_with(source.float(), scale, codec, global_scale))

    def encode() -> Tensor:
        pieces = zip(source.split(ROWS), scale.split(ROWS), strict=True)
        rounded = (round_with(weight.float(), part, codec, global_scale) for weight, part in pieces)
        return torch.cat([codec.pack(each)[codec.codes] for each in rounded])

    weights, activations = format_.scheme(SHAPE[1])
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**activations) if activations else None,
    )
    compressor = BaseCompressor.get_value_from_registry(format_.compression)
    # A one-level scale is given as its value, a two-level one as it is stored.
    given = codec.scale_value(scale, None) if global_scale is None else scale.float()
    state = {"weight": source.float(), "weight_scale": given}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    for mine, peers in (
        (encode(), compressor.compress(state, scheme)[codec.codes]),
        (codec.decode(packed), compressor.decompress(packed, scheme)["weight"]),
    ):
        if not torch.equal(mine.view(torch.uint8), peers.view(torch.uint8)):
            sys.exit(f"{format_.name}: compressed-tensors gets something else")
    return (
        (encode, lambda: codec.decode(packed)),
        (lambda: compressor.compress(state, scheme), lambda: compressor.decompress(packed, scheme)),
    )


def measured(format_: Format, source: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios by whose it is, operation and copy."""
    assert format_.codec is not None
    # Read and written once: 2 bytes a weight in BF16, and its codes and scales; a copy moves 4.
    moved = (2 + format_.codec.weight_bytes(*SHAPE) / source.numel()) / 4
    found: dict[str, dict[str, dict[str, float]]] = {}
    for owner, operations in zip(("ours", "compressed-tensors"), cases(format_, source), strict=True):
        found[owner] = {}
        for name, operation in zip(("encode", "decode"), operations, strict=True):
            copies = ratio(source, operation)
            found[owner][name] = {"copy": round(copies, 1), "bytes": round(copies / moved, 1)}
    return found


def main() -> None:
    """Print two lines a codec, and store them."""
    torch.set_num_threads(1)
    source = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    print(f"{SHAPE[0]}x{SHAPE[1]} BF16, one thread, torch {torch.__version__}; medians of {REPEATS}")
    against = ("copy", "bytes")
    print(f"{'':28}" + "".join(f"{f'{name}, {each}':>15}" for name in ("encode", "decode") for each in against))
    results = {}
    for name in FORMATS:
        if FORMATS[name].codec is None or name == FormatName.NVFP4A16:
            continue
        results[str(name)] = measured(FORMATS[name], source)
        for owner, operations in results[str(name)].items():
            cells = (operations[operation][each] for operation in ("encode", "decode") for each in against)
            print(f"{f'{name}, {owner}':28}" + "".join(f"{cell:15.1f}" for cell in cells))
    save("codecs", {"shape": list(SHAPE), "threads": 1, "ratios": results})


if __name__ == "__main__":
    main()
