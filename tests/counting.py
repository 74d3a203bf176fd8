"""Operations rather than seconds: what grows with a model is counted, whatever else the machine does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_OURS = tuple(str(Path(__file__).parents[1] / package) for package in ("prismaquant_ray", "actors", "jobs"))


def operations(action: Callable[[], Any]) -> int:
    """Bytecode instructions of the product that an action runs, in this thread."""
    count = 0

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return inside

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return inside

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count
