"""A device's arithmetic against the CPU's, on something small: what would make its weights or prices wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.backward.price import rounded_projections
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formats.base import Codec, Rounded
from prismaquant_ray.formats.nvfp4 import divisor
from prismaquant_ray.forward.gptq import Gptq, HessianFactor, factorize, gptq
from prismaquant_ray.forward.scale_search import ScaleSearch, nearest, searched
from prismaquant_ray.forward.statistics import output_error

# A matrix of so many rows, and its inputs.
_ROWS, _COLUMNS, _TOKENS = 48, 256, 1024
# Sums in another order agree to this share; GPTQ follows other ties then, with an output error as good.
_SUMS, _AS_GOOD = 1e-4, 0.02
_REPORT = "report it with this output, and set cluster.device: cpu meanwhile"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Something that must be so: what was found, and what to do where it is not."""

    name: str
    passed: bool
    found: str
    advice: str = ""


def device_checks(device: torch.device, formats: Sequence[FormatName], dtype: torch.dtype) -> list[Check]:
    """Products in the model's type, every codec's kernels, and every rounding of activations."""
    return [
        _product_check(device, dtype),
        *(_codec_check(codec, device) for codec in codecs_of(formats).values()),
        *(_projection_check(name, device) for name in formats if FORMATS[name].round_activation is not None),
    ]


def _product_check(device: torch.device, dtype: torch.dtype) -> Check:
    """Sums of products keep float32 although their factors have the model's type."""
    a, b = drawn(256, 4096, seed=1).to(dtype), drawn(4096, 256, seed=2).to(dtype)
    found = (a.to(device) @ b.to(device)).double().cpu()
    exact = a.double() @ b.double()
    error = float(((found - exact).abs() / (a.double().abs() @ b.double().abs())).max())
    # A rounding to the type of the result, of a sum that may be much smaller than its terms.
    bound = 2 * torch.finfo(dtype).eps
    return Check(
        name=f"products in {str(dtype).removeprefix('torch.')}",
        passed=error <= bound,
        found=f"error {error:.1e} of the terms, at most {bound:.1e}",
        advice="something makes torch add in fewer bits, e.g. NVIDIA_TF32_OVERRIDE in the environment: unset it",
    )


def _codec_check(codec: Codec, device: torch.device) -> Check:
    """Nearest values, decoded weights bit by bit; searched scales nearly all; GPTQ with an output error as good."""
    weight = (drawn(_ROWS, _COLUMNS, seed=3) * 0.02).bfloat16().float()
    inputs = drawn(_TOKENS, _COLUMNS, seed=4) @ (torch.eye(_COLUMNS) + 0.2 * drawn(_COLUMNS, _COLUMNS, seed=5))
    hessian = inputs.T @ inputs
    factor = factorize(hessian, Gptq())
    expected = _rounded(codec, weight, hessian, factor)
    on_device = HessianFactor(upper=factor.upper.to(device), order=factor.order.to(device))
    found = _rounded(codec, weight.to(device), hessian.to(device), on_device)
    near, search, best = (
        (_moved(rounded, torch.device("cpu")), reference) for rounded, reference in zip(found, expected, strict=True)
    )
    packed = {suffix: tensor.cpu() for suffix, tensor in codec.pack(found[0]).items()}
    # As numbers: INT4 has one zero.
    decoded = torch.equal(codec.decode(packed), codec.dequantized(near[1]))
    exact = decoded and torch.equal(near[0].values, near[1].values)
    scales = [rounded.scale.view(torch.uint8) for rounded in search]
    other = int((scales[0] != scales[1]).sum())
    errors = [float(output_error(codec.dequantized(each).float() - weight, hessian).sum()) for each in (*best, near[1])]
    passed = exact and other * 1000 <= scales[0].numel() and errors[0] <= (1 + _AS_GOOD) * errors[1] < errors[2]
    return Check(
        name=f"{codec.name} weights",
        passed=passed,
        found=f"values and decoded weights {'equal' if exact else 'DIFFER'}, {other} of {scales[0].numel()} bytes of "
        f"searched scales differ, output error of GPTQ {errors[0] / errors[1]:.4f} of the reference's",
        advice=f"its weights would be wrong: {_REPORT}",
    )


def _rounded(codec: Codec, weight: Tensor, hessian: Tensor, factor: HessianFactor) -> tuple[Rounded, Rounded, Rounded]:
    scale = codec.global_scale(weight.abs().amax().view(1))
    near = nearest(weight, codec, scale)
    search = searched(weight, codec, scale, hessian.diagonal(), ScaleSearch()) if codec.searched else near
    return near, search, gptq(weight, search, codec, factor)


def _moved(rounded: Rounded, device: torch.device) -> Rounded:
    scale = rounded.global_scale
    return Rounded(
        values=rounded.values.to(device),
        scale=rounded.scale.to(device),
        global_scale=None if scale is None else scale.to(device),
    )


def _projection_check(name: FormatName, device: torch.device) -> Check:
    """What rounded inputs do to the loss, as the reference has it."""
    x, difference, grad_input = (drawn(_ROWS, _COLUMNS, seed=seed) for seed in (6, 7, 8))
    scale = divisor(x.abs().max(), 2.0) if FORMATS[name].static_input_scale else None
    expected = rounded_projections(x, difference, grad_input, scale, name)
    given = [None if tensor is None else tensor.to(device) for tensor in (x, difference, grad_input, scale)]
    found = rounded_projections(*given, name).cpu()
    terms = (x.abs() * (difference.abs() + grad_input.abs())).sum(-1)
    error = float(((found - expected).abs() / terms).max())
    return Check(
        name=f"{name} activations",
        passed=error <= _SUMS,
        found=f"projections differ by {error:.1e} of their terms",
        advice=f"its prices would be wrong: {_REPORT}",
    )


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal random numbers, the same everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
