"""Fast checks for NaN and infinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prismaquant_ray.errors import InputError


def all_finite(*tensors: Tensor) -> bool:
    """Whether no element of any of the tensors, all on one device, is NaN or infinite. The host waits once.

    A sum is one pass, a test of every element several. NaN and infinity make the sum non-finite; every element is
    tested only then, because finite numbers may overflow together.
    """
    return bool(_sums_are_finite(tensors)) or all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _sums_are_finite(tensors: Sequence[Tensor]) -> Tensor:
    return torch.isfinite(torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors])).all()


class FiniteChecks:
    """Checks whose answers the host reads when it has waited for the device anyway; on a CPU they are read at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[tuple[str, Tensor, Sequence[Tensor]]] = []

    def add(self, problem: str, *tensors: Tensor) -> None:
        """InputError with this text, now or by `settle`, if any of the tensors holds NaN or infinity."""
        if self._device.type == "cpu":
            if not all_finite(*tensors):
                raise InputError(problem)
            return
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(_sums_are_finite(tensors), non_blocking=True)
        self._open.append((problem, answer, tensors))

    def clear(self) -> None:
        """Forget what was added, and let go of its tensors: the step it belongs to was given up."""
        self._open.clear()

    def settle(self) -> None:
        """Raise what was found. Costs no time where the device has done everything that was added."""
        opened, self._open = self._open, []
        if opened:
            torch.cuda.current_stream(self._device).synchronize()
        for problem, answer, tensors in opened:
            if not bool(answer) and not all_finite(*tensors):
                raise InputError(problem)
