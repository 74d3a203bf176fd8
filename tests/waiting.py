"""Waiting for conditions: how long it takes is no claim of a test, but a test must not hang."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

#: Seconds after which something hangs, on however busy a machine.
PATIENCE = 600.0


def wait_for(what: Callable[[], Any], driver: subprocess.Popen[str] | None = None, pause: float = 0.005) -> Any:
    """What `what` returns once it is true; fails when the driver ends before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        if driver is not None and driver.poll() is not None:
            _, err = driver.communicate()
            raise AssertionError(f"the driver ended ({driver.returncode}) before what was waited for:\n{err}")
        time.sleep(pause)
    raise AssertionError("what was waited for never came")
