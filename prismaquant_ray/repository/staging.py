"""Publishing a repository at its place, as a whole and only after verification.

A local directory is written beside its place and renamed. An object store has no renaming: shards go to their final
keys, and the files that make them a model (`LAST`) are held back until the end. Concurrent jobs on one prefix are not
excluded.
"""

from __future__ import annotations

import builtins
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prismaquant_ray.errors import InputError
from prismaquant_ray.interruption import uninterrupted
from prismaquant_ray.parsing import MAX_BYTES, MalformedError
from prismaquant_ray.repository.manifest import MANIFEST, check_ours, readable_manifest
from prismaquant_ray.source.files import CONFIG, INDEX
from prismaquant_ray.storage.connection import local_path
from prismaquant_ray.storage.prefix import ByteWriter, Prefix
from prismaquant_ray.storage.record import new_attempt
from prismaquant_ray.storage.store import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

_T = TypeVar("_T")
#: The files that make shards a model, in the order in which they must appear.
LAST = (MANIFEST, INDEX, CONFIG)


@contextmanager
def staged_output(output: str | Path) -> Iterator[Prefix]:
    """A place to write and verify a repository; it appears at `output` when the block ends.

    When the block raises, a local `output` is unchanged; a URI has no config.json, and the same command may run again.

    Raises:
        InputError: something else is at `output`.
    """
    directory = local_path(str(output))
    if directory is not None:
        with staged_directory(directory) as staging:
            yield Store(staging)
        return
    _check_place(output)
    staged = StagedPrefix(Store(str(output)))
    yield staged
    staged.publish()


def check_output(output: str | Path, *, dequantized: bool = False) -> None:
    """Check that `output` is empty or holds our repository of the same kind, complete or not.

    Raises:
        InputError: it holds something else.
    """
    _check_place(output)
    path = local_path(str(output))
    if path is not None and not path.is_dir():
        return
    try:
        manifest = readable_manifest(Store(str(output), create=False).get(MANIFEST, MAX_BYTES))
    except (KeyError, MalformedError):
        return
    if manifest.dequantized != dequantized:
        kind = "quantized" if dequantized else "dequantized"
        raise InputError(f"{output} holds a {kind} repository; choose another output")


def _check_place(output: str | Path) -> None:
    """Raise InputError unless the place is empty or holds our repository."""
    path = local_path(str(output))
    if path is None:
        check_ours(str(output), Store(str(output)).list())
    else:
        _check_directory(path)


# Object stores --------------------------------------------------------------------------------------------------


class StagedPrefix:
    """A prefix that holds back `LAST` (config.json, index, complete manifest) until `publish`; reads see them already.

    Everything else goes to the store at once.
    """

    divisible = True

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[str, bytes] = {}

    @property
    def uri(self) -> str:
        """URI of the prefix."""
        return self._store.uri

    def publish(self) -> None:
        """Write the files held back, config.json last."""
        for key in LAST:
            if key in self._kept:
                self._store.put(key, self._kept.pop(key))

    def put(self, key: str, data: Buffer) -> None:
        """Write an object, or hold it back."""
        if key in (INDEX, CONFIG) or (key == MANIFEST and readable_manifest(bytes(data)).complete):
            self._kept[key] = bytes(data)
        else:
            self._kept.pop(key, None)
            self._store.put(key, data)

    def upload(self, key: str, write: Callable[[ByteWriter], _T]) -> _T:
        """Stream a shard to the store."""
        return self._store.upload(key, write)

    def get(self, key: str, at_most: int | None = None) -> bytes:
        """The object as published."""
        return self._kept[key] if key in self._kept else self._store.get(key, at_most)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> builtins.list[Buffer]:
        """Byte ranges of the object as published."""
        if key in self._kept:
            return [self._kept[key][start:stop] for start, stop in ranges]
        return self._store.get_ranges(key, ranges)

    def size(self, key: str) -> int | None:
        """Size of the object as published, in bytes; None if there is none."""
        return len(self._kept[key]) if key in self._kept else self._store.size(key)

    def list(self) -> builtins.list[str]:
        """All keys as published."""
        return sorted({*self._store.list(), *self._kept})

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, including those held back."""
        keys = [*keys]
        for key in keys:
            self._kept.pop(key, None)
        self._store.delete(keys)


# Directories ----------------------------------------------------------------------------------------------------


def _check_directory(path: Path) -> None:
    if path.is_dir():
        if os.path.ismount(path):
            raise InputError(f"{path} is a mount point and cannot be replaced; choose a directory inside it")
        if (path / MANIFEST).is_file():
            return
        other = min((entry.name for entry in path.iterdir()), default=None)
        if other is not None:
            raise InputError(f"{path} holds something else ({other}); choose another output or empty it")
    elif path.exists() or path.is_symlink():
        raise InputError(f"{path} is not a directory; choose another output")


@contextmanager
def staged_directory(output: Path) -> Iterator[Path]:
    """A fresh directory beside `output`, put in its place by renaming when the block ends.

    When the block raises, the fresh directory is removed and `output` is unchanged. Leftovers of killed runs are
    removed at entry; if a run was killed between its two renames, the old output is restored.
    """
    _check_directory(output)
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(output)
    staging, lock = _make(output)
    try:
        yield staging
        _check_directory(output)
        _swap(staging, output)
    finally:
        _remove(staging, lock)


@uninterrupted
def _make(output: Path) -> tuple[Path, int]:
    """A fresh directory, and the lock that marks it as in use; the kernel releases it with the process."""
    staging = output.parent / f".{output.name}.writing-{new_attempt()}"
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return staging, lock


@uninterrupted
def _remove(staging: Path, lock: int) -> None:
    os.close(lock)
    shutil.rmtree(staging, ignore_errors=True)


@uninterrupted
def _swap(staging: Path, output: Path) -> None:
    if not output.exists():
        staging.rename(output)
        return
    replaced = output.parent / f".{output.name}.replaced-{new_attempt()}"
    output.rename(replaced)
    try:
        staging.rename(output)
    except OSError:
        replaced.rename(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _clean_up(output: Path) -> None:
    ours = re.compile(rf"\.{re.escape(output.name)}\.(writing|replaced)-[0-9a-f]{{12}}")
    for path in sorted(output.parent.iterdir()):
        found = ours.fullmatch(path.name)
        if found is None or path.is_symlink() or not path.is_dir():
            continue
        if found[1] == "replaced" and not output.exists():
            path.rename(output)
        elif found[1] == "replaced" or not _in_use(path):
            shutil.rmtree(path, ignore_errors=True)


def _in_use(staging: Path) -> bool:
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False
