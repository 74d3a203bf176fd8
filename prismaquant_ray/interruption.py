"""Where a stop may interrupt, and where it waits: what is made or removed must not be half there.

The command line raises an exception in the main thread when a signal asks it to stop, and asks here whether it may.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])
_UNINTERRUPTED: set[CodeType] = set()
# An exception inside an import leaves half a module, or becomes another one in C; one in a destructor is lost.
_IMPORTS = "<frozen importlib"
_NAMES = {"__del__", "TemporaryDirectory.__init__", "TemporaryDirectory.__exit__"}


def uninterrupted(function: _F) -> _F:
    """Mark a function that a stop waits for, from its first instruction to its last; nothing else of it changes."""
    _UNINTERRUPTED.add(function.__code__)
    return function


def may_interrupt(frame: FrameType | None) -> bool:
    """Whether an exception may be raised in a frame: nothing on its stack is marked, imports or is a destructor."""
    while frame is not None:
        code = frame.f_code
        if code in _UNINTERRUPTED or code.co_filename.startswith(_IMPORTS):
            return False
        if code.co_name in _NAMES or code.co_qualname in _NAMES:
            return False
        frame = frame.f_back
    return True
