"""Rounding the inputs of quantized modules: by one of our formats if it matches, else by compressed-tensors.

Everything is computed in float32; scales stored in BF16 are converted exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from prismaquant_ray.compressed.quantized_modules import Module, QuantizedModule
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import ActivationRounding, Format
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE, INPUT_SCALE, INPUT_ZERO_POINT
from prismaquant_ray.source.checkpoint import Checkpoint

#: Inputs (…, I), one row per token, → inputs as the runtime rounds them, in their dtype.
InputRounding = Callable[[Tensor], Tensor]

# With MX weights, activations of the same width are MX too; some writers do not state it.
_MX = {FormatName.MXFP4: 4, FormatName.MXFP8: 8}


def static_tensors(args: QuantizationArgs) -> tuple[str, ...]:
    """Suffixes of the tensors that the rounding needs."""
    if args.strategy == "tensor_group":
        return (INPUT_GLOBAL_SCALE,)
    if args.dynamic:
        return ()
    return (INPUT_SCALE,) if args.symmetric else (INPUT_SCALE, INPUT_ZERO_POINT)


def unroundable_because(module: QuantizedModule, args: QuantizationArgs) -> str | None:
    """Why inputs cannot be rounded, or None."""
    if args.strategy not in ("tensor", "token", "group", "tensor_group"):
        return f"activation scales by {args.strategy}"
    if not args.dynamic and args.strategy not in ("tensor", "tensor_group"):
        return f"static activation scales by {args.strategy}"
    if args.group_size is not None and module.columns % args.group_size:
        return f"activations in groups of {args.group_size}, of which {module.columns} is no multiple"
    if args.type == "float" and (args.num_bits not in (4, 6, 8) or not args.symmetric):
        return "floats have 4, 6 or 8 bits and no zero point"
    for suffix in static_tensors(args):
        info = module.tensors.get(suffix)
        if info is None:
            return f"there is no {suffix}"
        if info.shape not in ((), (1,), (1, 1)):
            return f"{suffix} has shape {info.shape}"
    return None


def format_of_weights(module: QuantizedModule) -> FormatName | None:
    """Our format of a module's weights, or None."""
    return module.format if isinstance(module, Module) else None


def format_of_inputs(args: QuantizationArgs, weights: FormatName | None) -> Format | None:
    """Our format with this activation rounding, for weights of this format, or None; of several that of the weights."""
    key = _key(args, _MX.get(weights) == args.num_bits if weights is not None else False)
    same = [name for name, known in _OURS.items() if known == key]
    return FORMATS[weights if weights in same else same[0]] if same else None


def input_rounding(args: QuantizationArgs, weights: FormatName | None, static: Mapping[str, Tensor]) -> InputRounding:
    """The rounding; `static` has the tensors that `static_tensors` names, by suffix."""
    ours = format_of_inputs(args, weights)
    scales = {
        suffix: tensor.to(torch.float32).reshape(1) for suffix, tensor in static.items() if suffix != INPUT_ZERO_POINT
    }
    zero = static[INPUT_ZERO_POINT].reshape(1) if INPUT_ZERO_POINT in static else None
    if ours is not None:
        assert ours.round_activation is not None
        rows = functools.partial(_by_format, ours.round_activation, scales.get(INPUT_GLOBAL_SCALE))
    elif args.dynamic or args.strategy == "tensor_group":
        rows = functools.partial(_dynamic, args, scales.get(INPUT_GLOBAL_SCALE))
    else:
        rows = functools.partial(_static, args, scales[INPUT_SCALE], zero)

    def rounding(x: Tensor) -> Tensor:
        return rows(x.flatten(0, -2).to(torch.float32)).view(x.shape).to(x.dtype)

    return rounding


class StoredRoundings(Mapping[str, InputRounding]):
    """Input roundings by module, for modules whose scheme quantizes inputs.

    Static scales are read on access: a worker needs only those of its blocks, out of tens of thousands in a repository
    with experts. A scale that is not a positive number raises InputError.
    """

    def __init__(
        self, source: Checkpoint, modules: Mapping[str, QuantizedModule], schemes: Mapping[str, QuantizationScheme]
    ) -> None:
        self._source = source
        self._modules = {name: modules[name] for name in modules if schemes[name].input_activations is not None}
        self._schemes = schemes
        self._found: dict[str, InputRounding] = {}

    def __getitem__(self, name: str) -> InputRounding:
        if name not in self._found:
            module, args = self._modules[name], self._schemes[name].input_activations
            names = {suffix: module.tensors[suffix].name for suffix in static_tensors(args)}
            read = self._source.read(names.values())
            static = {suffix: read[tensor] for suffix, tensor in names.items()}
            _check_scales(static, f"{self._source.store.uri}: {name}")
            self._found[name] = input_rounding(args, format_of_weights(module), static)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def _check_scales(static: Mapping[str, Tensor], where: str) -> None:
    for suffix, tensor in static.items():
        if tensor.is_floating_point() and not bool((tensor.isfinite() & (tensor > 0)).all()):
            raise InputError(f"{where}.{suffix} is {tensor.item()}; the repository is damaged, fetch or make it again")


# Rows (R, I) float32 ------------------------------------------------------------------------------------------------


def _by_format(round_activation: ActivationRounding, divisor: Tensor | None, x: Tensor) -> Tensor:
    return round_activation(x, _there(divisor, x))


def _dynamic(args: QuantizationArgs, divisor: Tensor | None, x: Tensor) -> Tensor:
    # compressed-tensors has one scale per token for (batch, tokens, features), but a single one for (rows, features).
    batch, divisor = x.unsqueeze(0), _there(divisor, x)
    scale, zero = compute_dynamic_scales_and_zp(batch, args, module=None, global_scale=divisor)
    rounded: Tensor = fake_quantize(batch, scale, zero, args, divisor)
    return rounded.squeeze(0)


def _static(args: QuantizationArgs, scale: Tensor, zero: Tensor | None, x: Tensor) -> Tensor:
    rounded: Tensor = fake_quantize(x, scale.to(x.device), _there(zero, x), args)
    return rounded


def _there(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(x.device)


# Formats ------------------------------------------------------------------------------------------------------------


def _key(args: QuantizationArgs, mx: bool) -> tuple[Any, ...]:
    """The quantization arguments that determine how activations are rounded."""
    local = args.strategy == "tensor_group"  # a stored divisor and dynamic group scales, whatever `dynamic` says
    scales = torch.uint8 if mx else None if local else args.scale_dtype
    width = args.num_bits, args.type, args.symmetric
    return (*width, args.strategy, args.group_size, local or bool(args.dynamic), scales)


def _ours() -> dict[FormatName, tuple[Any, ...]]:
    found = {}
    for name, spec in FORMATS.items():
        activations = spec.scheme(128)[1] if spec.scheme is not None else None
        if activations is not None:
            found[name] = _key(QuantizationArgs.model_validate(activations), mx=False)
    return found


_OURS = _ours()
