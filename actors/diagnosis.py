"""What a worker can do, tried on something small: checks of its device, rates of products, copies and storage."""

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

from prismaquant_ray.device_checks import Check, device_checks, drawn
from prismaquant_ray.events import Machine
from prismaquant_ray.formats import FormatName, codecs_of
from prismaquant_ray.formats.base import Codec
from prismaquant_ray.forward.encode import Rounding, encode_group
from prismaquant_ray.forward.statistics import InputSums
from prismaquant_ray.storage.record import new_attempt
from prismaquant_ray.storage.store import Store

#: Where in a run store something is written, read and deleted.
PLACE = "doctor"
# Square matrices whose products are timed, and the matrix that is encoded; and bytes that are copied, digested, stored.
_PRODUCT = {"cpu": 1024, "cuda": 8192}
_ENCODED = {"cpu": (256, 1024), "cuda": (4096, 4096)}
_COPIED, _STORED = 1 << 28, 1 << 25


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
    with torch.no_grad():
        checks = device_checks(device, formats, dtype)
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


# Rates -------------------------------------------------------------------------------------------------------------


def _rates(device: torch.device, formats: Sequence[FormatName], dtype: torch.dtype, store: Store) -> Rates:
    side = _PRODUCT[device.type]
    a, b = (drawn(side, side, seed=seed).to(device, dtype) for seed in (9, 10))
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
    weight = (drawn(rows, columns, seed=11) * 0.02).bfloat16().to(device)
    sums = InputSums(columns, device)
    inputs = drawn(columns + 256, columns, seed=12).to(device)
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
