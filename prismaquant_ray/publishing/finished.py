"""The repository to publish: checked against its manifest, before anything is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.parsing import MAX_BYTES, MalformedError
from prismaquant_ray.repository.manifest import (
    DEQUANTIZED,
    MANIFEST,
    MANIFEST_SCHEMA,
    Manifest,
    as_json,
    is_shard,
    read_manifest,
)
from prismaquant_ray.repository.staging import LAST
from prismaquant_ray.source.files import CONFIG, INDEX
from prismaquant_ray.storage.store import Store, existing

#: Bytes per piece when reading files.
PIECE = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A publication: files sent, already present, removed at the target, and not in the manifest (`unlisted`).

    `place` is the address for people; `public` is None for buckets, where a policy decides.
    """

    source: str
    target: str
    place: str
    public: bool | None
    verified: int
    bytes: int
    bytes_sent: int
    sent: tuple[str, ...]
    present: tuple[str, ...]
    removed: tuple[str, ...]
    unlisted: tuple[str, ...]


class Listener(Protocol):
    """Receives the progress of a publication; sizes are bytes."""

    def begin(self, what: str, files: int, size: int) -> None:
        """A stage begins: number of files and their total size."""

    def advance(self, size: int) -> None:
        """`size` more bytes of the stage are done."""

    def done(self, name: str, what: str, size: int) -> None:
        """A file is done; `what` says how, for people."""


@dataclass(frozen=True, slots=True)
class File:
    """A file by content; `blob_id` is its git object id, SHA-1 over `blob SIZE\\0` and the bytes."""

    name: str
    size: int
    sha256: str
    blob_id: str

    @classmethod
    def of(cls, name: str, data: bytes) -> File:
        """The description of bytes in memory."""
        digests = Digests(len(data))
        digests.update(data)
        return digests.file(name)


class Digests:
    """Both digests of a file of `size` bytes, in one pass."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        self._sha256.update(data)
        self._git.update(data)

    def file(self, name: str) -> File:
        """The file whose bytes were taken."""
        return File(name, self._size, self._sha256.hexdigest(), self._git.hexdigest())


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRepository:
    """A complete repository by its manifest; `uri` is as the user wrote it.

    `sizes` has every file to publish, in this order: small files, weights, `LAST`. `unlisted` are files not in the
    manifest.
    """

    uri: str
    store: Store
    manifest: Manifest
    sizes: Mapping[str, int]
    unlisted: tuple[str, ...]

    @property
    def dequantized(self) -> bool:
        """Whether it holds decoded weights."""
        return self.manifest.dequantized

    def digest(self, listener: Listener) -> tuple[File, ...]:
        """Read every file once.

        Raises:
            InputError: a file does not have the digest in the manifest.
        """
        digests_of = self.manifest.sha256
        listener.begin("checking", len(self.sizes), sum(self.sizes.values()))
        files = []
        for name, size in self.sizes.items():
            digests = Digests(size)
            for piece in pieces(self.store, name, size):
                digests.update(piece)
                listener.advance(len(piece))
            file = digests.file(name)
            if file.sha256 != digests_of.get(name, file.sha256):
                raise InputError(
                    f"{self.store.uri}: {name} has other bytes than {MANIFEST} says (SHA-256 {file.sha256[:12]}…, not "
                    f"{digests_of[name][:12]}…); it is damaged, make the repository again or copy it whole"
                )
            files.append(file)
        return tuple(files)

    def published(
        self,
        target: str,
        place: str,
        *,
        public: bool | None,
        sent: Sequence[File],
        present: Sequence[File],
        removed: Iterable[str],
    ) -> Published:
        """The publication of this repository at `target`."""
        return Published(
            source=self.uri,
            target=target,
            place=place,
            public=public,
            verified=len(sent) + len(present),
            bytes=sum(self.sizes.values()),
            bytes_sent=sum(file.size for file in sent),
            sent=tuple(file.name for file in sent),
            present=tuple(file.name for file in present),
            removed=tuple(removed),
            unlisted=self.unlisted,
        )

    def is_weights(self, name: str) -> bool:
        """Whether a file is one of the shards."""
        return is_shard(name)

    def claim(self, stale: Iterable[str]) -> bytes:
        """A manifest that marks a place as ours and incomplete; it lists its files and the `stale` ones."""
        head = {"schema": self.manifest.schema} | ({"kind": DEQUANTIZED} if self.dequantized else {})
        return as_json(head | {"complete": False, "files": {**dict.fromkeys(stale, 0), **self.manifest.files}})

    def get(self, file: File) -> bytes:
        """The bytes of a small file.

        Raises:
            StoreError: it changed since it was digested.
        """
        data = self.store.get(file.name)
        self._check_same(file, File.of(file.name, data))
        return data

    def copy(self, file: File, write: Callable[[bytes], object], advance: Callable[[int], None]) -> None:
        """Write the bytes of a file. `advance` gets the bytes written, and their negative sum if the copy fails.

        Raises:
            StoreError: after the last byte, if the file changed since it was digested.
        """
        digests, copied = Digests(file.size), 0
        with ExitStack() as failed:
            failed.callback(lambda: advance(-copied))
            for piece in pieces(self.store, file.name, file.size):
                digests.update(piece)
                write(piece)
                copied += len(piece)
                advance(len(piece))
            self._check_same(file, digests.file(file.name))
            failed.pop_all()

    def _check_same(self, file: File, found: File) -> None:
        if found != file:
            raise StoreError(
                f"{self.store.uri}: {file.name} changed while it was read; run the same command again when nothing "
                "writes there"
            )


def pieces(store: Store, name: str, size: int) -> Iterator[bytes]:
    """The bytes of a file of that size, `PIECE` at a time."""
    for start in range(0, size, PIECE):
        yield bytes(store.get_ranges(name, [(start, min(size, start + PIECE))])[0])


def open_finished(uri: str) -> FinishedRepository:
    """The repository at `uri`; only its manifest is read.

    Raises:
        InputError: it is not complete, or a file has another size.
    """
    store = existing(uri)
    manifest = _manifest(store)
    listed = manifest.files
    keys = set(store.list())
    for name, size in listed.items():
        found = store.size(name) if name in keys else None
        if found is None:
            raise InputError(f"{uri}: {name} is missing; make the repository again or copy it whole")
        if found != size:
            raise InputError(
                f"{uri}: {name} has {found:,} bytes, but {MANIFEST} says {size:,}; the repository was changed or "
                "copied in part, make it again"
            )
    names = [name for name in sorted(listed, key=lambda name: (is_shard(name), name)) if name not in LAST]
    sizes = listed | {MANIFEST: store.size(MANIFEST) or 0}
    return FinishedRepository(
        uri=uri,
        store=store,
        manifest=manifest,
        sizes={name: sizes[name] for name in (*names, *LAST)},
        unlisted=tuple(sorted(keys - {*names, *LAST})),
    )


def _manifest(store: Store) -> Manifest:
    """The manifest of a complete repository; raises InputError for anything else."""
    try:
        found = read_manifest(store.get(MANIFEST, MAX_BYTES))
    except KeyError:
        raise InputError(
            f"{store.uri} has no {MANIFEST}, so it is no repository of this project; give what `quantize`, `assemble` "
            "or `dequantize` wrote"
        ) from None
    except MalformedError as error:
        raise InputError(f"{store.uri}: {MANIFEST} {error}; make the repository again") from None
    if not found.complete:
        raise InputError(f"{store.uri} is not complete ({MANIFEST}); let the job that writes it finish first")
    files, sha256 = found.files, found.sha256
    if found.schema != MANIFEST_SCHEMA:
        raise InputError(f"{store.uri}: {MANIFEST} is of another version of this project; make the repository again")
    if odd := [name for name in files if not name or name.startswith("/") or {"", ".", ".."} & {*name.split("/")}]:
        raise InputError(f"{store.uri}: {MANIFEST} names a file {odd[0]!r}, which cannot be; make the repository again")
    absent = [name for name in (CONFIG, INDEX, *sha256) if name not in files]
    absent += [name for name in files if name not in sha256]
    if absent or not any(map(is_shard, sha256)):
        raise InputError(
            f"{store.uri}: {MANIFEST} does not describe {min(absent, default='any weights')}; make the repository again"
        )
    return found
