"""Reading ahead in a thread while something else is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Prefetcher(Generic[_Key, _Value]):
    """Values that a thread reads before they are requested.

    A thread is enough: reading waits for storage, and copies outside Python's lock. Errors are raised by `get`.
    """

    def __init__(self, read: Callable[[_Key], _Value]) -> None:
        self._read = read
        self._thread: ThreadPoolExecutor | None = None
        self._pending: dict[_Key, Future[_Value]] = {}

    def prefetch(self, keys: Iterable[_Key]) -> None:
        """Begin to read these, in order, and drop any others."""
        before, self._pending = self._pending, {}
        for key in keys:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            self._pending[key] = before.pop(key) if key in before else self._thread.submit(self._read, key)
        for unwanted in before.values():
            unwanted.cancel()

    def get(self, key: _Key) -> _Value:
        """The value, which is then no longer held here; read now when it was not prefetched."""
        future = self._pending.pop(key, None)
        return self._read(key) if future is None else future.result()
