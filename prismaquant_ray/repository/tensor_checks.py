"""Checks of one quantized module's tensors: valid scales, finite weights, the bytes of the stored candidate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE, WEIGHT_GLOBAL_SCALE
from prismaquant_ray.layout import LinearSpec, Matrix
from prismaquant_ray.source.header import TensorInfo, as_tensor
from prismaquant_ray.source.protocol import Piece
from prismaquant_ray.source.ranges import read_pieces

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Weights decoded at a time, so that they stay in the cache of a core.
_DECODED = 1 << 18

#: A module's tensors by suffix.
Stored = Mapping[str, tuple[TensorInfo, "Buffer"]]


def by_module(pieces: Iterable[Piece]) -> Mapping[str, Stored]:
    """Tensors by module and suffix."""
    found: dict[str, dict[str, tuple[TensorInfo, Buffer]]] = {}
    for info, data in read_pieces(pieces):
        module, _, suffix = info.name.rpartition(".")
        found.setdefault(module, {})[suffix] = info, data
    return found


def same_bytes(left: Buffer, right: Buffer) -> bool:
    """Whether bytes are equal. bytearray uses memcmp; == on memoryviews compares element by element."""
    return bytearray(left) == right


def shared_scale_problems(matrix: Matrix, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Global scales that differ although the runtime applies one of them to several modules."""
    experts = list(zip(*(linear.names for linear in matrix.linears), strict=True))
    together = {
        WEIGHT_GLOBAL_SCALE: experts,
        INPUT_GLOBAL_SCALE: [tuple(name for names in experts for name in names)],
    }
    for suffix, sharing in together.items():
        for modules in sharing:
            found = {_raw(tensors[f"{name}.{suffix}"]) for name in modules if f"{name}.{suffix}" in tensors}
            if len(found) > 1:
                where = matrix.name if matrix.experts is None else ", ".join(modules[:2])
                yield f"{where}: members have different {suffix}; vLLM applies one of them to all"


def scale_problems(linear: LinearSpec, module: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Scales and divisors that a runtime cannot use, and a stored shape that is not the Linear's."""
    scale = tensors["weight_scale"]
    # E8M0: 255 is NaN, and 0 is a subnormal the runtimes read differently.
    highest = 254 if scale.dtype == torch.uint8 else torch.finfo(scale.dtype).max
    low, high = torch.aminmax(scale.to(torch.float32))  # NaN if anything is
    if not 0 < low.item() <= high.item() <= highest:
        yield f"{module}.weight_scale has zero, negative, infinite or NaN scales"
    for suffix in (WEIGHT_GLOBAL_SCALE, INPUT_GLOBAL_SCALE):
        divisor = tensors.get(suffix)
        if divisor is None:
            continue
        if not (bool(torch.isfinite(divisor).all()) and bool((divisor > 0).all())):
            yield f"{module}.{suffix} is {divisor.tolist()}; it must be finite and above zero"
        elif suffix == WEIGHT_GLOBAL_SCALE and not torch.equal(divisor.to(torch.bfloat16).to(torch.float32), divisor):
            yield f"{module}.{suffix} is not a BF16 value; vLLM would decode other weights than transformers"
    if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [linear.out_features, linear.in_features]:
        yield f"{module}.weight_shape is {tensors['weight_shape'].tolist()}"


def weight_problems(
    codec: Codec, linear: LinearSpec, module: str, tensors: Mapping[str, Tensor], ours: Stored, theirs: Stored
) -> Iterator[str]:
    """Weights that decode to no number, and tensors whose bytes are not the stored candidate's."""
    step = max(1, _DECODED // linear.in_features // codec.rows)
    rows = zip(tensors[codec.codes].split(step * codec.rows), tensors["weight_scale"].split(step), strict=True)
    decoded = (codec.decode({**tensors, codec.codes: codes, "weight_scale": scale}) for codes, scale in rows)
    if not all(map(_is_finite, decoded)):
        yield f"{module} decodes to NaN or infinite weights"
    changed = [suffix for suffix in ours if suffix in theirs and not same_bytes(ours[suffix][1], theirs[suffix][1])]
    if changed:
        stored = {suffix: as_tensor(data, info.dtype, info.shape) for suffix, (info, data) in theirs.items()}
        weights = "the same" if _raw(codec.decode(stored)) == _raw(codec.decode(tensors)) else "other"
        yield f"{module}: {', '.join(changed)} not as in the stored candidate; it decodes to {weights} weights"


def _is_finite(values: Tensor) -> bool:
    """Whether all values are finite, from the extremes (both NaN if any value is), without a temporary tensor."""
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
