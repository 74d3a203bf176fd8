"""Copies from a GPU to the host that run beside its kernels."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopies:
    """Copies to pinned memory on a stream of their own; on a CPU tensors stay what they are.

    What `take` returns may be read after `wait`.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor on the host, as the kernels launched so far leave it."""
        if self._stream is None or tensor.device.type == "cpu":
            return tensor
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
