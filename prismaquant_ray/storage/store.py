"""The run store's keys and bytes: a local directory or an object-store URI behind one small interface.

Only operations that every backend has are used: put, ranged get, list, delete and *create if absent*. Requests to
object stores are retried, with back-off and jitter, for a bounded time; their errors reach the user as one line without
credentials. s3:// is tested against a real server; gs:// runs the same code and is untested.
"""

from __future__ import annotations

import logging
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from prismaquant_ray.errors import InputError, PrismaquantError, StoreError
from prismaquant_ray.parsing import check_length
from prismaquant_ray.storage.connection import absolute, connect, local_path, parse
from prismaquant_ray.storage.failures import (
    FAILURES,
    Problem,
    UploadInterruptedError,
    clean,
    diagnose_store,
    is_missing,
    short,
    to_error,
)
from prismaquant_ray.storage.prefix import ByteWriter
from prismaquant_ray.storage.retry import retried

if TYPE_CHECKING:
    from obstore import WritableFile
    from obstore.store import ObjectStore
    from typing_extensions import Buffer

#: A failing operation is retried for this long. By time, not by count: ten quick retries are over in seconds.
RETRY_SECONDS = 120.0
#: The same for `check_readable` and `check_writable`, which people wait for.
CHECK_SECONDS = 8.0
#: How often `Store.upload` starts a stream anew after the retries of its parts were used up.
UPLOADS = 3
#: Larger objects are sent in parts of this size, `PARTS_AT_ONCE` at a time: memory of a transfer is their product.
PART_BYTES = 8 * 2**20
PARTS_AT_ONCE = 3

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
# Prefix of check_writable's keys; never listed, so that leftovers of a killed check are invisible.
_PROBE = ".prismaquant-probe-"


class Store:
    """Keys below one prefix. Instances hold no credentials: each process reads its own environment.

    Pickles hold the URI only. A missing object is KeyError (or None, or nothing, as documented). InputError means that
    credentials, bucket or permissions are wrong, StoreError everything else, after the retries.
    """

    #: As in `prefix.Prefix`.
    divisible = True

    def __init__(self, uri: str | Path, create: bool = True, *, seconds: float | None = None) -> None:
        """Open a prefix. A missing local directory is made when `create`; else it raises StoreError.

        Object stores are not asked anything yet. `seconds` bounds the retries of one operation.
        """
        self.uri = str(uri)
        self.path = local_path(self.uri)
        self._create = create
        self._seconds = RETRY_SECONDS if seconds is None else seconds
        self._backend: ObjectStore
        self._once: ObjectStore  # does not repeat requests
        if self.path is None:
            bucket = parse(self.uri)
            try:
                self._backend = connect(bucket, seconds=self._seconds, retries=1000)
                self._once = connect(bucket, seconds=self._seconds, retries=0)
            except BaseError as error:
                reason = short(clean(str(error).partition("\n")[0]), 150)
                raise InputError(f"{self.uri}: cannot be opened with these settings ({reason})") from None
            return
        if re.match(r"(s3|gs):", self.uri):
            raise InputError(f"{self.uri} is not a directory; a URI has two slashes, as in s3://bucket/prefix")
        if not create and not self.path.is_dir():
            raise StoreError(f"{self.uri}: no such directory")
        try:
            self._backend = self._once = LocalStore(prefix=self.path.absolute(), mkdir=True)
        except FAILURES as error:
            raise StoreError(f"{self.uri}: cannot be opened or created ({error})") from error

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (absolute(self.uri), self._create)

    # Objects ----------------------------------------------------------------------------------------------------

    def get(self, key: str, at_most: int | None = None) -> bytes:
        """The whole object; KeyError when it does not exist, MalformedError when it has more than `at_most` bytes."""

        self._check_file(key)

        def read() -> bytes:
            found = obstore.get(self._backend, key)
            if at_most is not None:
                check_length(found.meta["size"], at_most)
            return bytes(found.bytes())

        return self._repeat(f"{key} cannot be read", read, key)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Bytes [start, stop) of each range, zero-copy where the backend allows; KeyError when absent."""
        wanted = [(start, stop) for start, stop in ranges if start < stop]  # backends refuse an empty range
        starts, ends = [start for start, _ in wanted], [stop for _, stop in wanted]

        self._check_file(key)

        def read() -> list[Buffer]:
            return cast("list[Buffer]", obstore.get_ranges(self._backend, key, starts=starts, ends=ends))

        found = iter(self._repeat(f"{key} cannot be read", read, key))
        return [next(found) if start < stop else b"" for start, stop in ranges]

    def _check_file(self, key: str) -> None:
        """StoreError for a pipe, a socket or a device in a directory: reading it might never end."""
        try:
            mode = 0 if self.path is None else (self.path / key).stat().st_mode
        except OSError:
            return  # the backend says what it is
        if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise StoreError(f"{self.uri}: {key} is not a file, but a pipe, a socket or a device; remove it")

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None when it does not exist."""
        self._check_file(key)
        try:
            return self._repeat(f"{key} cannot be read", lambda: int(obstore.head(self._backend, key)["size"]), key)
        except KeyError:
            return None

    def put(self, key: str, data: Buffer) -> None:
        """Write or replace an object; readers see the old or the new object, never a part."""
        view = memoryview(data).cast("B")
        if self.path is None and view.nbytes > PART_BYTES:
            self.upload(key, lambda writer: _write_parts(writer, view))
            return
        self._repeat(f"{key} cannot be written", lambda: obstore.put(self._backend, key, view, use_multipart=False))

    def create(self, key: str, data: Buffer) -> bool:
        """Write an object only if it does not exist; False when it exists already."""
        view = memoryview(data).cast("B")
        unanswered = False

        def attempt() -> bool:
            nonlocal unanswered
            try:
                obstore.put(self._once, key, view, mode="create", use_multipart=False)
            except AlreadyExistsError:
                # An earlier attempt whose answer was lost may have created it.
                return unanswered and self._holds(key, view)
            except FAILURES:
                unanswered = True
                raise
            return True

        return self._repeat(f"{key} cannot be written", attempt)

    def _holds(self, key: str, data: memoryview) -> bool:
        try:
            return self.get(key) == data
        except KeyError:
            return False

    @contextmanager
    def open_writer(self, key: str) -> Iterator[ByteWriter]:
        """Stream an object of any size; it appears when the block ends and not at all when it raises."""
        stream = _Stream(self, key)
        try:
            yield stream
        except BaseException as cause:
            stream.abort(cause)
            raise
        stream.close()

    def upload(self, key: str, write: Callable[[ByteWriter], _T]) -> _T:
        """Stream an object with `write`, again from the start when the backend failed; the result of `write`."""
        for _ in range(UPLOADS - 1):
            try:
                with self.open_writer(key) as writer:
                    return write(writer)
            except UploadInterruptedError:
                _LOG.warning("%s: the upload of %s was interrupted and starts again", self.uri, key)
        with self.open_writer(key) as writer:
            return write(writer)

    def list(self, prefix: str = "") -> list[str]:
        """Every key below a prefix (a whole path segment), sorted."""

        def pages() -> list[str]:
            listing = obstore.list(self._backend, prefix or None)
            return sorted(str(entry["path"]) for page in listing for entry in page)

        return [key for key in self._repeat("cannot be listed", pages) if not key.startswith(_PROBE)]

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; absent ones are fine."""
        if isinstance(self._backend, S3Store):
            batch = [*keys]
            if batch:
                # Up to 1000 keys per request; S3 ignores absent ones.
                what = batch[0] if len(batch) == 1 else f"{batch[0]} and {len(batch) - 1} more"
                self._repeat(f"{what} cannot be deleted", lambda: obstore.delete(self._backend, batch))
            return
        for key in keys:
            try:
                self._repeat(f"{key} cannot be deleted", lambda key=key: obstore.delete(self._backend, key), key)  # type: ignore[misc]
            except KeyError:
                continue

    # Checks -----------------------------------------------------------------------------------------------------

    def check_readable(self) -> None:
        """Check that the store responds and can be read; takes at most about 20 seconds."""
        if self.path is not None:
            if not self.path.is_dir():
                raise StoreError(f"{self.uri}: no such directory")
            self.list("absent")
            return
        hasty = Store(self.uri, seconds=CHECK_SECONDS)
        hasty._repeat("cannot be listed", lambda: next(iter(obstore.list(hasty._backend, chunk_size=1)), None))

    def check_writable(self) -> None:
        """Check that objects can be created and deleted, and that a second `create` does not overwrite.

        Takes at most about 20 seconds. Nothing is left behind; a local directory is not made.
        """
        if self.path is not None:
            check_directory(self.path)
            return
        self.check_readable()
        hasty = Store(self.uri, seconds=CHECK_SECONDS)
        probe = _PROBE + uuid4().hex
        created = hasty.create(probe, b"first")
        overwritten = hasty.create(probe, b"second")
        hasty.delete([probe])
        if not created or overwritten:
            raise StoreError(
                f"{self.uri}: the server ignores conditional writes (If-None-Match: *), so two runs could overwrite "
                "each other's records; use a server or gateway version that supports them"
            )

    # Failures ---------------------------------------------------------------------------------------------------

    def _repeat(self, what: str, action: Callable[[], _T], absent: str | None = None) -> _T:
        """The action's result, with retries; with `absent` a missing object raises KeyError(absent)."""

        def attempt() -> _T:
            try:
                return action()
            except FAILURES as error:
                if absent is not None and is_missing(error):
                    raise KeyError(absent) from None
                if self.path is not None:
                    raise to_error(self.uri, what, diagnose_store(error)) from error
                raise

        return retried(
            attempt,
            uri=self.uri,
            what=what,
            failures=FAILURES,
            diagnose=diagnose_store,
            seconds=self._seconds,
            # With a short deadline, back off less, so that a burst of 503s is not taken for a permanent failure.
            longest_pause=self._seconds / 15,
        )

    def _ask(self) -> Problem:
        """A likely reason of a failed upload whose own error was lost: that of a small one now."""
        probe = _PROBE + uuid4().hex
        try:
            obstore.put(self._once, probe, b"probe", use_multipart=False)
            obstore.delete(self._once, probe)
        except FAILURES as error:
            return diagnose_store(error)
        return Problem("the upload failed, and so did dropping its parts", "run the same command again", passing=True)


class _Stream:
    """An object on its way to a store."""

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.what = f"{key} cannot be written"
        self.writer: WritableFile = obstore.open_writer(
            store._backend, key, buffer_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
        )
        self.writer.__enter__()

    def write(self, buffer: Buffer, /) -> int:
        """Append bytes."""
        # obstore sends from the buffer itself, after write returned, so one that may change is copied.
        fixed = buffer if isinstance(buffer, bytes | obstore.Bytes) else bytes(buffer)
        try:
            return self.writer.write(fixed)
        except FAILURES as error:
            raise self.failure(error) from None

    def close(self) -> None:
        """Make the object appear."""
        try:
            self.writer.close()
        except FAILURES as error:
            raise self.failure(error) from None

    def abort(self, cause: BaseException) -> None:
        """Drop the sent parts. If that fails as well, because the server is gone, the cause must not be hidden."""
        try:
            self.writer.__exit__(type(cause), cause, cause.__traceback__)
        except FAILURES as error:
            _LOG.debug("%s: parts of an upload were left (%s)", self.store.uri, clean(diagnose_store(error).reason))

    def failure(self, error: BaseException) -> PrismaquantError:
        # When the last parts fail, obstore drops the upload and reports how *that* failed.
        problem = self.store._ask() if "performing DELETE" in str(error) else diagnose_store(error)
        return to_error(self.store.uri, self.what, problem, UploadInterruptedError if problem.passing else StoreError)


def existing(uri: str) -> Store:
    """The store of a repository that is to be read; InputError unless its directory is there."""
    path = local_path(uri)
    if path is not None and not path.is_dir():
        raise InputError(f"{uri} is not a directory; give a repository's directory or URI")
    store = Store(uri, create=False)
    store.check_readable()
    return store


def _write_parts(writer: ByteWriter, view: memoryview) -> None:
    for start in range(0, view.nbytes, PART_BYTES):
        writer.write(view[start : start + PART_BYTES])


def check_directory(path: Path) -> None:
    """StoreError unless `path`, or the directory it would be made in, can be written; makes nothing."""
    path = path.absolute()
    existing = next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())
    if not existing.is_dir():
        raise StoreError(f"{path}: cannot be a directory, {existing} is not one; choose another place")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise StoreError(f"{path}: {existing} cannot be written ({error.strerror}); choose another place") from error
