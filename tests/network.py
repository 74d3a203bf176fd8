"""A network whose every packet passes through this process, to be lost, delayed or withheld for each pair of hosts.

Each end is a TUN device: what a host sends there is read here and written to the device of the host it is for. That
needs no more of the kernel than TUN devices; packet filters and delaying queues are often missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterable
from types import TracebackType

import psutil

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
# Where an IPv4 header has the last byte of the address a packet is for; any other packet is none of ours.
_LAST_BYTE, _VERSION_4 = 19, 4
_LONGEST = 65536


class Network:
    """`attach` its ends, then `with network:`; `address` is that of an end.

    The faults may be switched at any time: `withhold` packets between two ends, `heal`; `losing` is the fraction of all
    packets that is lost, drawn from `seed`; `delay` the seconds that every packet takes. `carried` and `dropped` count.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.prefix = _unused_prefix()
        self.losing = self.delay = 0.0
        self.carried = self.dropped = 0
        self._withheld: frozenset[tuple[int, int]] = frozenset()
        self._random = random.Random(seed)
        self._devices: dict[int, int] = {}
        self._late: list[tuple[float, int, int, bytes]] = []
        self._count = itertools.count()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._stopped = False
        self._thread = threading.Thread(target=self._carry, name="network", daemon=True)

    def address(self, end: int) -> str:
        return f"{self.prefix}.{end}"

    def attach(self, end: int, init: int | None = None) -> None:
        """A device of this address in the network namespace of the process `init`, or in this process's."""
        try:
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            raise AssertionError(f"these tests need TUN devices, and this machine gives none: {error}") from error
        name = f"pq{os.getpid()}-{end}"
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
        self._devices[end] = device
        self._selector.register(device, selectors.EVENT_READ, end)
        inside: list[str] = []
        if init is not None:
            _run("ip", "link", "set", name, "netns", str(init))
            inside = ["nsenter", f"--target={init}", "--net"]
        _run(*inside, "ip", "address", "add", f"{self.address(end)}/24", "dev", name)
        _run(*inside, "ip", "link", "set", name, "up")

    def withhold(self, ways: Iterable[tuple[int, int]]) -> None:
        """Nothing more gets from the first to the second end of each pair."""
        self._withheld |= frozenset(ways)

    def heal(self) -> None:
        """No faults."""
        self._withheld = frozenset()
        self.losing = self.delay = 0.0

    def __enter__(self) -> Network:
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._wake.send(b"x")
        self._thread.join()
        self._selector.close()
        self._wake.close()
        self._woken.close()
        # A device ends with its file.
        for device in self._devices.values():
            os.close(device)

    def _carry(self) -> None:
        # Packets do not wait for what computes.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -15)
        while not self._stopped:
            timeout = max(0.0, self._late[0][0] - time.monotonic()) if self._late else None
            for key, _ in self._selector.select(timeout):
                if key.data is not None:
                    self._take(key.data, key.fd)
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, to, packet = heapq.heappop(self._late)
                self._deliver(to, packet)

    def _take(self, source: int, device: int) -> None:
        """Every packet that waits in a device."""
        while True:
            try:
                packet = os.read(device, _LONGEST)
            except BlockingIOError:
                return
            except OSError:
                # Its namespace is gone, or it is not up yet; an end that is gone would be readable for ever.
                self._selector.unregister(device)
                return
            if packet[0] >> 4 != _VERSION_4:
                continue
            to = packet[_LAST_BYTE]
            if (source, to) in self._withheld or (self.losing and self._random.random() < self.losing):
                self.dropped += 1
            elif self.delay:
                heapq.heappush(self._late, (time.monotonic() + self.delay, next(self._count), to, packet))
            else:
                self._deliver(to, packet)

    def _deliver(self, to: int, packet: bytes) -> None:
        device = self._devices.get(to)
        if device is not None:
            # A device that is gone or full loses packets, as networks do.
            with contextlib.suppress(OSError):
                os.write(device, packet)
                self.carried += 1


def _unused_prefix() -> str:
    """Of the addresses set aside for testing networks (RFC 2544), a /24 that no device of this machine has."""
    taken = {
        address.address.rpartition(".")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    }
    start = os.getpid()
    prefixes = (f"198.18.{(start + offset) % 256}" for offset in range(256))
    return next(prefix for prefix in prefixes if prefix not in taken)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
