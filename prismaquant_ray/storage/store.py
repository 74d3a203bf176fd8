"""The run store's keys and bytes: a local directory or an object-store URI behind one small interface.

Only what every backend can promise is used: put, ranged get, list, delete and *create if absent*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, from_url

from prismaquant_ray.errors import StoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore
    from typing_extensions import Buffer


class ByteWriter(Protocol):
    """What `Store.open_writer` yields."""

    def write(self, buffer: Buffer, /) -> int:
        """Append bytes."""
        ...


# By time, not by count: ten quick retries are used up in a few seconds of outage.
_RETRY = {
    "max_retries": 1000,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {"init_backoff": timedelta(milliseconds=500), "max_backoff": timedelta(seconds=5), "base": 2},
}


def local_path(uri: str) -> Path | None:
    """The directory a URI names when it is local, else None. Raises nothing: unknown schemes are not local."""
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri)


class Store:
    """Keys below one prefix. Instances hold no credentials: each process reads its own environment."""

    def __init__(self, uri: str | Path, *, create: bool = True) -> None:
        """Open a prefix. A missing local directory is made when `create`; else it raises StoreError."""
        self.uri = str(uri)
        self.path = local_path(self.uri)
        self._store: ObjectStore
        if self.path is None:
            self._store = from_url(self.uri, retry_config=_RETRY)  # type: ignore[call-overload]
            return
        if not create and not self.path.is_dir():
            raise StoreError(f"{self.uri}: no such directory")
        try:
            self._store = LocalStore(prefix=self.path.absolute(), mkdir=True)
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.uri}: cannot be opened or created ({error})") from error

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def get(self, key: str) -> bytes:
        """The whole object; KeyError when it does not exist."""
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except (FileNotFoundError, NotFoundError) as error:
            raise KeyError(key) from error
        except BaseError as error:
            raise StoreError(f"{self.uri}: {key} cannot be read ({error})") from error

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Bytes [start, stop) of each range, zero-copy where the backend allows; KeyError when absent."""
        wanted = [(start, stop) for start, stop in ranges if start < stop]  # backends refuse an empty range
        starts, ends = [start for start, _ in wanted], [stop for _, stop in wanted]
        try:
            found = iter(cast("list[Buffer]", obstore.get_ranges(self._store, key, starts=starts, ends=ends)))
            return [next(found) if start < stop else b"" for start, stop in ranges]
        except (FileNotFoundError, NotFoundError) as error:
            raise KeyError(key) from error
        except BaseError as error:
            raise StoreError(f"{self.uri}: {key} cannot be read ({error})") from error

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None when it does not exist."""
        try:
            return int(obstore.head(self._store, key)["size"])
        except (FileNotFoundError, NotFoundError):
            return None
        except BaseError as error:
            raise StoreError(f"{self.uri}: {key} cannot be read ({error})") from error

    def put(self, key: str, data: Buffer) -> None:
        """Write or replace an object; readers see the old one or the new one, never a part."""
        try:
            obstore.put(self._store, key, memoryview(data))
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.uri}: {key} cannot be written ({error})") from error

    def create(self, key: str, data: Buffer) -> bool:
        """Write an object only if it does not exist; False when somebody else was first."""
        try:
            obstore.put(self._store, key, memoryview(data), mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.uri}: {key} cannot be written ({error})") from error
        return True

    @contextmanager
    def open_writer(self, key: str) -> Iterator[ByteWriter]:
        """Stream an object of any size; it appears when the block ends and not at all when it raises."""
        try:
            with cast("AbstractContextManager[ByteWriter]", obstore.open_writer(self._store, key)) as writer:
                yield writer
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.uri}: {key} cannot be written ({error})") from error

    def list(self, prefix: str = "") -> list[str]:
        """Every key below a prefix (a whole path segment), sorted."""
        try:
            listing = obstore.list(self._store, prefix or None)
            return sorted(str(entry["path"]) for page in listing for entry in page)
        except BaseError as error:
            raise StoreError(f"{self.uri}: cannot be listed ({error})") from error

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; absent ones are fine."""
        for key in keys:
            try:
                obstore.delete(self._store, key)
            except (FileNotFoundError, NotFoundError):
                continue
            except BaseError as error:
                raise StoreError(f"{self.uri}: {key} cannot be deleted ({error})") from error
