"""Limits of an evaluation: quantization that is not simulated, and scales that vLLM does not apply as stored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from compressed_tensors.quantization import QuantizationScheme

from prismaquant_ray.compressed.cache_scales import rounds_cache
from prismaquant_ray.compressed.decoded_repository import divisor_caveats, fused_apart
from prismaquant_ray.compressed.quantized_modules import QuantizedModule
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE, INPUT_SCALE, WEIGHT_GLOBAL_SCALE
from prismaquant_ray.source.checkpoint import Checkpoint

# Scalars that vLLM keeps once per fused matrix, and how it merges different ones.
_FUSED = {
    INPUT_GLOBAL_SCALE: "applies the largest to all",
    INPUT_SCALE: "applies the largest to all",
    "weight_scale": "rounds these weights again, under the largest",
}
_LATER_EXPERT = re.compile(r"\.experts\.(?!0\.)\d+\.")
_CACHE = tuple(f"{part}_{what}" for part in ("q", "k", "v", "output") for what in ("scale", "zero_point"))


def scheme_caveats(scheme: Mapping[str, Any], schemes: Mapping[str, QuantizationScheme]) -> Iterator[str]:
    """One line for each part of a quantization_config that is not simulated."""
    if scheme.get("kv_cache_scheme") and not rounds_cache(scheme):
        yield "the keys and values of the cache are not rounded (kv_cache_scheme)"
    for route, group in schemes.items():
        if group.weights is None:
            yield f"{route} ({', '.join(group.targets)}) quantizes no weights and is not applied"
        if group.output_activations is not None:
            yield f"outputs are not rounded ({route} has output_activations)"
        inputs = group.input_activations
        if inputs is not None and inputs.dynamic and inputs.strategy == "tensor":
            yield f"{route} has one activation scale for all tokens that run together, here those of a microbatch"


def cache_tensors(
    source: Checkpoint, scheme: Mapping[str, Any], schemes: Mapping[str, QuantizationScheme]
) -> frozenset[str]:
    """Names of scales of KV cache, attention and outputs, which the original model does not have."""
    groups = schemes.values()
    rounded = any(group.weights is None or group.output_activations is not None for group in groups)
    if not scheme.get("kv_cache_scheme") and not rounded:
        return frozenset()
    return frozenset(name for name in source.stored if name.rpartition(".")[2] in _CACHE)


def fused_caveats(source: Checkpoint, modules: Mapping[str, QuantizedModule]) -> Iterator[str]:
    """One line for each kind of scale that vLLM, which fuses matrices, does not apply as stored.

    Reads the scalars of all modules, in one request per file; of a layer's experts only those of the first.
    """
    names: dict[str, dict[str, str]] = {suffix: {} for suffix in (WEIGHT_GLOBAL_SCALE, *_FUSED)}
    for module in modules.values():
        if not _LATER_EXPERT.search(module.name):
            for suffix in names.keys() & module.tensors.keys():
                info = module.tensors[suffix]
                if math.prod(info.shape) == 1:
                    names[suffix][module.name] = info.name
    read = source.read(tensor for found in names.values() for tensor in found.values())
    values = {suffix: {name: read[tensor].item() for name, tensor in found.items()} for suffix, found in names.items()}
    yield from divisor_caveats(values[WEIGHT_GLOBAL_SCALE])
    for suffix, consequence in _FUSED.items():
        if apart := fused_apart(values[suffix]):
            yield f"{apart}: {suffix} is not that of what vLLM fuses with it; vLLM {consequence}"
