"""Copies between the host's memory and a GPU's, which run beside its kernels; on a CPU tensors stay what they are."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

#: The ring of pinned memory that weights pass on their way to a GPU: pieces, and bytes of each.
PIECES, PIECE_BYTES = 4, 1 << 26


class HostCopies:
    """Copies to pinned memory on a stream of their own.

    What `take` returns may be read after `wait`.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if has_own_memory(device) else None

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor on the host, as the kernels launched so far leave it."""
        if self._stream is None or tensor.device.type == "cpu":
            return tensor.cpu()
        found = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            found.copy_(tensor, non_blocking=True)
        # Its memory is not given to another tensor before it is copied.
        tensor.record_stream(self._stream)
        return found

    def wait(self) -> None:
        """Everything that was taken has arrived."""
        if self._stream is not None:
            self._stream.synchronize()


class DeviceCopies:
    """Copies to a GPU through a ring of pinned pieces, on a stream of their own.

    While a piece is copied the next one is filled, so that memory of any kind and size is copied as fast as pinned
    memory, and no more than the ring is ever pinned. One thread may call `take` at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if has_own_memory(device) else None
        self._pieces = itertools.cycle(_Piece() for _ in range(PIECES if self._stream else 0))

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, for kernels that are launched from now on. It may be changed afterwards."""
        if self._stream is None or tensor.device.type != "cpu" or tensor.numel() == 0:
            return tensor.to(self.device)
        tensor = tensor.contiguous()
        found = torch.empty_like(tensor, device=self.device)
        # Its memory may be that of a tensor which kernels launched before still read.
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        for part, target in zip(_pieces(tensor), _pieces(found), strict=True):
            next(self._pieces).send(part, target, self._stream)
        current.wait_stream(self._stream)
        return found


class _Piece:
    """Pinned memory that is filled, copied, and filled again when the copy is done."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._copied = torch.cuda.Event()

    def send(self, part: Tensor, target: Tensor, stream: torch.cuda.Stream) -> None:
        if self._memory is None:
            self._memory = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._copied.synchronize()
        filled = self._memory[: len(part)].copy_(part)
        with torch.cuda.stream(stream):
            target.copy_(filled, non_blocking=True)
            self._copied.record(stream)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Its bytes, as many at a time as a piece of the ring holds."""
    found: tuple[Tensor, ...] = tensor.reshape(-1).view(torch.uint8).split(PIECE_BYTES)
    return found


def has_own_memory(device: torch.device) -> bool:
    """Whether a device's memory is not the host's: a CPU's is, and that of a GPU on one chip with its CPU."""
    return device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated
