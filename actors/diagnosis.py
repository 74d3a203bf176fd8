"""What a worker can do, tried on something small: kernels against the reference, rates of products, copies, storage."""

from __future__ import annotations

import hashlib
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prismaquant_ray.backward.price import rounded_projections
from prismaquant_ray.events import Machine
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formats.base import Codec, Rounded
from prismaquant_ray.formats.nvfp4 import divisor
from prismaquant_ray.forward.encode import Rounding, encode_group
from prismaquant_ray.forward.gptq import Gptq, HessianFactor, factorize, gptq
from prismaquant_ray.forward.scale_search import ScaleSearch, nearest, searched
from prismaquant_ray.forward.statistics import InputSums, output_error
from prismaquant_ray.storage.record import new_attempt
from prismaquant_ray.storage.store import Store

#: Where in a run store something is written, read and deleted.
PLACE = "doctor"
# A matrix of so many rows, and its inputs.
_ROWS, _COLUMNS, _TOKENS = 48, 256, 1024
# Square matrices whose products are timed, and the matrix that is encoded; and bytes that are copied, digested, stored.
_PRODUCT = {"cpu": 1024, "cuda": 8192}
_ENCODED = {"cpu": (256, 1024), "cuda": (4096, 4096)}
_COPIED, _STORED = 1 << 28, 1 << 25
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Medians of three tries. Products in FLOP/s, encoding in weights/s through all formats, others in bytes/s.

    Copies are those between host and GPU, None without one. Writing and reading go to and from the run store's place.
    """

    products: float
    encoding: float
    to_device: float | None
    to_host: float | None
    digest: float
    write: float
    read: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerDiagnosis:
    """One worker: where it runs, its software, what was checked, and its rates."""

    machine: Machine
    torch_version: str
    #: of a GPU: compute capability, as 9.0, NVIDIA's driver, and the version of CUDA that torch was built for
    capability: str | None
    driver: str | None
    cuda: str | None
    cores: int
    checks: Sequence[Check]
    rates: Rates


def diagnose(
    machine: Machine, device: torch.device, *, formats: Sequence[FormatName], dtype: torch.dtype, store: Store
) -> WorkerDiagnosis:
    """Check and time a device and the way to a store; takes seconds."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    checks = [_product_check(device, dtype)]
    with torch.no_grad():
        checks += [_codec_check(codec, device) for codec in codecs_of(formats).values()]
        checks += [_projection_check(name, device) for name in formats if FORMATS[name].round_activation is not None]
        rates = _rates(device, formats, dtype, store)
    return WorkerDiagnosis(
        machine=machine,
        torch_version=torch.__version__,
        capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        driver=_driver(),
        cuda=torch.version.cuda,
        cores=len(os.sched_getaffinity(0)),
        checks=checks,
        rates=rates,
    )


def _driver() -> str | None:
    """The version of the kernel module, 570.86.15."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


# Checks ------------------------------------------------------------------------------------------------------------


def _product_check(device: torch.device, dtype: torch.dtype) -> Check:
    """Sums of products keep float32 although their factors have the model's type."""
    a, b = _drawn(256, 4096, seed=1).to(dtype), _drawn(4096, 256, seed=2).to(dtype)
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
    weight = (_drawn(_ROWS, _COLUMNS, seed=3) * 0.02).bfloat16().float()
    inputs = _drawn(_TOKENS, _COLUMNS, seed=4) @ (torch.eye(_COLUMNS) + 0.2 * _drawn(_COLUMNS, _COLUMNS, seed=5))
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
    x, difference, grad_input = (_drawn(_ROWS, _COLUMNS, seed=seed) for seed in (6, 7, 8))
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


# Rates -------------------------------------------------------------------------------------------------------------


def _rates(device: torch.device, formats: Sequence[FormatName], dtype: torch.dtype, store: Store) -> Rates:
    side = _PRODUCT[device.type]
    a, b = (_drawn(side, side, seed=seed).to(device, dtype) for seed in (9, 10))
    rows, columns = _ENCODED[device.type]
    copied = torch.empty(_COPIED if device.type == "cuda" else 1, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = copied.to(device)
    data = os.urandom(_STORED)
    key = f"{PLACE}/{new_attempt()}"
    try:
        write = _seconds(lambda: store.put(key, data), device)
        read = _seconds(lambda: store.get(key), device)
    finally:
        store.delete([key])
    cuda = device.type == "cuda"
    return Rates(
        products=2 * side**3 / _seconds(lambda: a @ b, device),
        encoding=rows * columns / _seconds(_encoding(rows, columns, formats, device), device),
        to_device=_COPIED / _seconds(lambda: there.copy_(copied, non_blocking=True), device) if cuda else None,
        to_host=_COPIED / _seconds(lambda: copied.copy_(there, non_blocking=True), device) if cuda else None,
        digest=_STORED / _seconds(lambda: hashlib.sha256(data), device),
        write=_STORED / write,
        read=_STORED / read,
    )


def _encoding(rows: int, columns: int, formats: Sequence[FormatName], device: torch.device) -> Callable[[], object]:
    """What a block does to each of its matrices at the end of the forward pass."""
    weight = (_drawn(rows, columns, seed=11) * 0.02).bfloat16().to(device)
    sums = InputSums(columns, device)
    inputs = _drawn(columns + 256, columns, seed=12).to(device)
    sums.add(inputs[256:], inputs[:256])
    rounding, statistics_ = Rounding(), sums.statistics()
    codecs: Mapping[str, Codec] = codecs_of(formats)

    def encode() -> None:
        factor = rounding.factor(statistics_)
        for codec in codecs.values():
            (encoded,) = encode_group([weight], codec, statistics_, factor, rounding)
            codec.pack(encoded.rounded)

    return encode


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """The median of three tries after a first one."""
    tries = []
    for _ in range(4):
        _synchronize(device)
        start = time.perf_counter()
        action()
        _synchronize(device)
        tries.append(time.perf_counter() - start)
    return statistics.median(tries[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
