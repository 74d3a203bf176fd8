"""Moving boundaries: as bytes to another worker, and by threads to and from the run store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from prismaquant_ray.storage.record import Artifact, read_tensors, write_tensors
from prismaquant_ray.storage.store import Store

#: A boundary activation as bytes: (dtype name, array). Ray moves numpy arrays without copying them.
Activation = tuple[str, NDArray[Any]]

_NAME = "boundary"
# Boundaries queued for writing; beyond that `put` blocks.
_WAITING = 4


class Outbox:
    """Writes boundaries in the background. Errors are raised by `put`, `completed` and `flush`."""

    def __init__(self, store: Store, threads: ThreadPoolExecutor) -> None:
        self._store = store
        self._threads = threads
        self._pending: dict[int, Future[Artifact]] = {}
        self.written: dict[int, Artifact] = {}

    def put(self, microbatch: int, key: str, tensor: Tensor) -> None:
        """Take over a boundary; the tensor must not be changed afterwards."""
        while len(self._pending) >= _WAITING:
            self._complete(next(iter(self._pending)))
        self._pending[microbatch] = self._threads.submit(write_tensors, self._store, key, {_NAME: tensor})

    def completed(self) -> dict[int, Artifact]:
        """The boundaries written so far, by microbatch."""
        for microbatch in [microbatch for microbatch, future in self._pending.items() if future.done()]:
            self._complete(microbatch)
        return dict(self.written)

    def flush(self) -> dict[int, Artifact]:
        """Wait until all are written; every boundary, by microbatch."""
        for microbatch in list(self._pending):
            self._complete(microbatch)
        return dict(self.written)

    def _complete(self, microbatch: int) -> None:
        self.written[microbatch] = self._pending.pop(microbatch).result()


class Inbox:
    """Reads a shard's boundaries from the store to a device, one microbatch ahead where one record names both.

    `find` reads the record that names a microbatch's boundary. Other records are left alone: a unit that another worker
    is still running has none yet.
    """

    def __init__(
        self,
        store: Store,
        threads: ThreadPoolExecutor,
        find: Callable[[int], dict[int, Artifact]],
        microbatches: Sequence[int],
        device: torch.device,
    ) -> None:
        self._store = store
        self._threads = threads
        self._find = find
        self._device = device
        self._artifacts: dict[int, Artifact] = {}
        self._following = dict(pairwise(microbatches))
        self._ahead: dict[int, Future[tuple[Tensor, int]]] = {}

    def get(self, microbatch: int) -> tuple[Tensor, int]:
        """The boundary and its bytes; DamagedError when it is missing or differs from its digest."""
        future = self._ahead.pop(microbatch, None)
        if microbatch not in self._artifacts:
            self._artifacts.update(self._find(microbatch))
        boundary, size = future.result() if future is not None else self._read(microbatch)
        following = self._following.get(microbatch)
        if following in self._artifacts:
            self._ahead[following] = self._threads.submit(self._read, following)
        return boundary.to(self._device, non_blocking=True), size

    def _read(self, microbatch: int) -> tuple[Tensor, int]:
        artifact = self._artifacts[microbatch]
        boundary = read_tensors(self._store, artifact)[_NAME]
        return boundary.pin_memory() if self._device.type == "cuda" else boundary, artifact.size


def read_boundary(store: Store, artifact: Artifact, device: torch.device) -> tuple[Tensor, int]:
    """A stored boundary on a device, and its bytes."""
    return read_tensors(store, artifact)[_NAME].to(device), artifact.size


def to_wire(tensor: Tensor) -> Activation:
    """A tensor as bytes; BF16 has no numpy type, so it travels as 16-bit integers."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return "bfloat16", tensor.view(torch.int16).numpy()
    return str(tensor.dtype).removeprefix("torch."), tensor.numpy()


def from_wire(activation: Activation, device: torch.device) -> Tensor:
    """A copy on a device: arrays from Ray's object store are read-only and shared."""
    name, array = activation
    tensor = torch.empty(array.shape, dtype=getattr(torch, name), pin_memory=device.type == "cuda")
    (tensor.view(torch.int16) if name == "bfloat16" else tensor).numpy()[...] = array
    # From pinned memory the copy runs while the host goes on.
    return tensor.to(device, non_blocking=True)
