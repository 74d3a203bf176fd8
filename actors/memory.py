"""Available memory, within a container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil

# cgroup v2, then v1: limit and use of the group this process is in, as containers see them.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def planned_of(device_bytes: int) -> int:
    """What is planned of a GPU's memory: the rest is for fragments and for the workspaces of libraries."""
    return device_bytes * 92 // 100


def free_memory() -> int:
    """Bytes available on this machine, within the container's limit."""
    free = int(psutil.virtual_memory().available)
    for limit, used in _CGROUPS:
        allowed = _number(limit)
        if allowed is not None:
            return max(0, min(free, allowed - (_number(used) or 0) + _reclaimable()))
    return free


def _reclaimable() -> int:
    """Page cache that the kernel can drop: it counts as used but is available."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
