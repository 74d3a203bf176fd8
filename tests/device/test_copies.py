"""Copies to a GPU and back: every kind of tensor arrives, through no more pinned memory than the ring has."""

from __future__ import annotations

import pytest

from tests.device.test_pretended_cuda import child

pytestmark = pytest.mark.device

_CASES = """
import torch
from types import SimpleNamespace
from unittest.mock import patch
from prismaquant_ray import copies
from tests.pretended import device as pretended
from tests.pretended.device import CUDA, pretended_cuda

generator = torch.Generator().manual_seed(0)
whole = torch.randn(37, 11, generator=generator)
tensors = [
    whole, whole.T, whole[3:, ::2], whole.bfloat16(), whole.to(torch.float8_e4m3fn), whole > 0, whole.to(torch.int64),
    whole[0, 0], torch.empty(0, 4), torch.arange(3),
]
log, numbers = [], iter(range(1000))

class Event(pretended._Event):
    def __init__(self):
        self.number = next(numbers)
    def record(self, _):
        log.append(("copied", self.number))
    def synchronize(self):
        log.append(("waited for", self.number))
"""


def test_every_tensor_arrives_through_a_ring_of_bounded_memory() -> None:
    differing, waits, pinned, log = child(
        _CASES + "with patch.object(copies, 'PIECE_BYTES', 100), pretended_cuda() as ledger, "
        "patch.object(torch.cuda, 'Event', Event):\n"
        "    to_device, to_host = copies.DeviceCopies(CUDA), copies.HostCopies(CUDA)\n"
        "    there = [to_device.take(tensor) for tensor in tensors]\n"
        "    assert all(tensor.device == CUDA for tensor in there)\n"
        "    pinned = [piece._memory.nbytes for piece, _ in zip(to_device._pieces, range(copies.PIECES))]\n"
        "    waits = [kind for kind, _ in ledger.waits]\n"
        "    back = [to_host.take(tensor) for tensor in there]\n"
        "    to_host.wait()\n"
        "same = [torch.equal(a.view(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))\n"
        "        for a, b in zip(back, tensors, strict=True)]\n"
        "result = [[n for n, equal in enumerate(same) if not equal], waits, pinned, log]"
    )
    assert differing == []
    # An empty tensor has nothing to stage.
    assert waits == ["copy to the device"]
    assert pinned == [100] * 4
    assert sum(kind == "copied" for kind, _ in log) > 4 * 5
    for piece in range(4):
        of_piece = [kind for kind, number in log if number == piece]
        # Before a piece is filled again, its last copy is over.
        assert of_piece == ["waited for", "copied"] * (len(of_piece) // 2)


def test_memory_that_is_the_hosts_own_is_not_pinned() -> None:
    same, pinned = child(
        _CASES + "shared = SimpleNamespace(is_integrated=True)\n"
        "with pretended_cuda(), patch.object(torch.cuda, 'get_device_properties', lambda *_: shared):\n"
        "    to_device, to_host = copies.DeviceCopies(CUDA), copies.HostCopies(CUDA)\n"
        "    back = to_host.take(to_device.take(whole))\n"
        "result = [torch.equal(back, whole), [*to_device._pieces]]"
    )
    assert same
    assert pinned == []
