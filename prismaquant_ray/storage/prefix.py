"""The interfaces of stores: of one that is only read, of a model's files, of one that repositories are written to."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from prismaquant_ray.parsing import MAX_BYTES, parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer

_T = TypeVar("_T")


class ByteWriter(Protocol):
    """An object that is being written."""

    def write(self, buffer: Buffer, /) -> int:
        """Append bytes."""
        ...


class Objects(Protocol):
    """What can be read below a prefix. Errors are those of `Store`."""

    #: Part of an object can be read alone.
    divisible: bool

    @property
    def uri(self) -> str:
        """Where it is, for errors."""

    def get(self, key: str, at_most: int | None = None, /) -> bytes:
        """The whole object; KeyError when it does not exist, MalformedError when it has more than `at_most` bytes."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]], /) -> builtins.list[Buffer]:
        """Bytes [start, stop) of each range."""

    def size(self, key: str, /) -> int | None:
        """Bytes of an object, or None when it does not exist."""

    def list(self) -> builtins.list[str]:
        """Every key, sorted."""


class Files(Objects, Protocol):
    """The files of a model: a `Store`, or a commit on the hub."""

    @property
    def path(self) -> Path | None:
        """The directory that holds all of them, where there is one."""


class Prefix(Objects, Protocol):
    """A `Store`, or a wrapper that defers some of its writes."""

    def put(self, key: str, data: Buffer, /) -> None:
        """Write or replace an object."""

    def upload(self, key: str, write: Callable[[ByteWriter], _T], /) -> _T:
        """Stream an object with `write`; the result of `write`."""

    def delete(self, keys: Iterable[str], /) -> None:
        """Delete objects; absent ones are fine."""


def get_json(store: Objects, key: str, *, finite: bool = False) -> Any:
    """The values of a JSON object of a store, as `parse_json` has them; KeyError when there is none."""
    return parse_json(store.get(key, MAX_BYTES), finite=finite)
