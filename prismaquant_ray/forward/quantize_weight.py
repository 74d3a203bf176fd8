"""A single weight matrix: rounded as in a run, and decoded as by a runtime."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Format
from prismaquant_ray.formats.nvfp4 import input_divisor
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE
from prismaquant_ray.forward.encode import Rounding, encode_group
from prismaquant_ray.forward.statistics import InputStatistics, InputSums

# One in _HOLDOUT tokens decides whether GPTQ beats the searched scales, as `calibration.holdout` does in a run.
_HOLDOUT = 8


def quantize_weight(
    weight: Tensor,
    format: FormatName | str,  # noqa: A002 - the word that users look for
    inputs: Tensor | None = None,
    *,
    rounding: Rounding | None = None,
) -> dict[str, Tensor]:
    """The tensors that a Linear ships in a format, by suffix, e.g. `weight_packed` and `weight_scale`.

    weight (O, I) in any float type. With inputs (tokens, I) group scales are searched with errors weighted by E[x²],
    GPTQ runs on seven of eight tokens, and the eighth ones decide which of them ships; a format with rounded
    activations also gets its `input_global_scale`. Without inputs every column counts alike and nothing is calibrated:
    group scales are searched, and there is no `input_global_scale`. `rounding` has the settings of both.

    Raises:
        InputError: the format is unknown, or cannot hold a matrix of this shape; or inputs have another width.
    """
    spec = _format(format)
    if weight.dim() != 2:
        raise InputError(f"a weight has two dimensions, outputs and inputs; this one has {weight.dim()}")
    reason = spec.refusal(*weight.shape)
    if reason is not None:
        raise InputError(f"a weight of {weight.shape[0]} × {weight.shape[1]} cannot be {spec.name} ({reason})")
    weight = weight.to(torch.bfloat16)
    if spec.codec is None:
        return {"weight": weight.contiguous()}
    statistics = _statistics(weight, inputs)
    settings = rounding if rounding is not None else Rounding()
    if inputs is None:
        settings = Rounding(scale_search=settings.scale_search, gptq=None)
    (encoded,) = encode_group([weight], spec.codec, statistics, settings.factor(statistics), settings)
    tensors = spec.codec.pack(encoded.rounded)
    if spec.static_input_scale and inputs is not None:
        tensors[INPUT_GLOBAL_SCALE] = input_divisor(statistics.largest)
    return tensors


def dequantize_weight(tensors: Mapping[str, Tensor], format: FormatName | str) -> Tensor:  # noqa: A002
    """The BF16 weight (O, I) that a runtime computes with, from the tensors of `quantize_weight`.

    Raises:
        InputError: the format is unknown.
    """
    spec = _format(format)
    return tensors["weight"] if spec.codec is None else spec.codec.decode(tensors)


def _format(name: FormatName | str) -> Format:
    if name not in FormatName.__members__:
        raise InputError(f"there is no format {name}; there are {', '.join(FormatName)}")
    return FORMATS[FormatName(name)]


def _statistics(weight: Tensor, inputs: Tensor | None) -> InputStatistics:
    width = weight.shape[1]
    if inputs is None:
        unit = torch.eye(width, device=weight.device)
        nothing = torch.zeros_like(unit)
        return InputStatistics(train=unit, holdout=nothing, train_tokens=1, holdout_tokens=0, amax=nothing[0])
    if inputs.dim() != 2 or inputs.shape[1] != width or not len(inputs):
        raise InputError(f"inputs must be (tokens, {width}) for this weight; they are {tuple(inputs.shape)}")
    sums = InputSums(width, weight.device)
    held_out = torch.arange(len(inputs)) % _HOLDOUT == _HOLDOUT - 1
    rows = inputs.to(weight.device)
    sums.add(rows[~held_out], rows[held_out])
    return sums.statistics()
