"""Operators that a GPU runs as one kernel, where the same in torch would take thousands of launches.

Each is an operator of torch, so that its tensors' device chooses: on a CPU the reference in torch, which stands beside
its use and defines the result; on a GPU the function `launch_…` of a module of this package, both with its name, which
launches a Triton kernel, or a few of torch's. Sums are added in another order there: results agree to float32's
rounding, and bit by bit where sums are exact.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import socket
from collections.abc import Callable
from typing import Any

import torch

from prismaquant_ray.errors import ResourceError

NAMESPACE = "prismaquant_ray"
#: The oldest GPUs that kernels and torch's grouped products run on, by compute capability.
LEAST = (8, 0)

_library = torch.library.Library(NAMESPACE, "DEF")


def operator(schema: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The operator that `schema` names and types, computed by `reference` on a CPU; see torch.library for schemas."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CPU")

    def launch(*arguments: Any) -> Any:
        return launcher(name)(*arguments)

    _library.impl(name, launch, "CUDA")
    found: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return found


@functools.cache
def launcher(name: str) -> Callable[..., Any]:
    """What a GPU runs for an operator."""
    module = importlib.import_module(f"{__name__}.{name}")
    found: Callable[..., Any] = getattr(module, f"launch_{name}")
    return found


def check_gpu() -> None:
    """ResourceError where kernels cannot be compiled for this process's GPU."""
    capability = torch.cuda.get_device_capability()
    if capability < LEAST:
        raise ResourceError(
            f"the GPU of {socket.gethostname()} has compute capability {capability[0]}.{capability[1]}; kernels need "
            f"{LEAST[0]}.{LEAST[1]} (A100, RTX 30) or later: use other nodes (cluster.labels), or cluster.device: cpu"
        )
    if importlib.util.find_spec("triton") is None:
        raise ResourceError(
            f"{socket.gethostname()} has a GPU but not Triton, in which its kernels are written; torch for CUDA comes "
            "with it: install that, or triton beside it"
        )
