"""Free ports for servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket

# Below what the kernel hands out to clients, above what Ray gives to its workers (10002 to 19999).
_FIRST, _LAST = 20_500, 32_000


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on; processes start to look at different places."""
    start = _FIRST + os.getpid() * 37 % (_LAST - _FIRST)
    found = []
    for port in itertools.chain(range(start, _LAST), range(_FIRST, start)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0 and probe.connect_ex(("127.0.0.2", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("every port is taken")
