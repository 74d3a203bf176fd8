"""A model on the hub without a copy: weights by byte ranges, small files through the hub's cache on this machine.

What the cache has already is read from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # documented, but in no __all__

from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.parsing import check_length
from prismaquant_ray.source.hub_ranges import READ_FAILURES, RangedFile, diagnose_reading
from prismaquant_ray.storage.hub_failures import tidy
from prismaquant_ray.storage.retry import retried
from prismaquant_ray.storage.store import RETRY_SECONDS, Store

if TYPE_CHECKING:
    import builtins

    from typing_extensions import Buffer

#: Files of a repository that belong to a model: weights in safetensors, and the small files beside them.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*")
#: Retries of the first question to the hub, which people wait for.
OPENING_SECONDS = 20.0
_WEIGHTS = ".safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Seconds for the list of a repository's files.
_SILENCE = 30.0


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file as the hub lists it; `sha256` where git holds only a reference to it."""

    size: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HubCommit:
    """The files of a model at one commit of a repository."""

    name: str
    id: str
    files: Mapping[str, ListedFile]

    @property
    def uri(self) -> str:
        """The commit, for errors."""
        return f"hf://{self.name}@{self.id[:12]}"

    @property
    def page(self) -> str:
        """The repository, for people."""
        return f"{constants.ENDPOINT}/{self.name}"

    @property
    def weights(self) -> dict[str, ListedFile]:
        """The safetensors files."""
        return {name: file for name, file in self.files.items() if name.endswith(_WEIGHTS)}

    @property
    def cached(self) -> dict[str, Path]:
        """The files that this machine's cache has, of this commit or with the same bytes of another one."""
        cache = Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}" / "blobs"
        found: dict[str, Path] = {}
        for name, file in self.files.items():
            known = try_to_load_from_cache(self.name, name, revision=self.id)
            places = [Path(known)] if isinstance(known, str) else []
            if file.sha256 is not None:
                places.append(cache / file.sha256)
            for place in places:
                if place.is_file() and place.stat().st_size == file.size:
                    found[name] = place
                    break
        return found


def commit_of(name: str, revision: str, *, place: str) -> HubCommit:
    """What a branch, tag or commit of a repository holds now; `place` is the model's, for errors.

    Raises:
        InputError: there is none, or this account may not read it.
        StoreError: the hub does not answer, or with something else.
    """
    try:
        info = retried(
            lambda: HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_SILENCE),
            uri=place,
            what=f"revision {revision} cannot be read",
            failures=READ_FAILURES,
            diagnose=lambda error: diagnose_reading(error, f"{constants.ENDPOINT}/{name}"),
            seconds=OPENING_SECONDS,
        )
        files: dict[str, ListedFile] = {}
        for entry in filter_repo_objects(
            info.siblings or (), allow_patterns=list(MODEL_FILES), key=lambda entry: entry.rfilename
        ):
            sha256 = None if entry.lfs is None else entry.lfs.sha256
            size = _size(entry.rfilename, entry.size, sha256)
            if size is None:
                raise StoreError(f"{place}: the hub lists a file {entry.rfilename[:80]!r} that cannot be one")
            files[entry.rfilename] = ListedFile(size, sha256)
    except HFValidationError:
        raise InputError(f"{place}: neither a directory nor the name of a repository; give one of them") from None
    # An answer in which the client misses something.
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{place}: the hub's list of files cannot be read ({tidy(str(error))[:100]})") from None
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise StoreError(f"{place}: the hub names no commit of revision {revision}")
    return HubCommit(name=name, id=info.sha, files=files)


def _size(name: str, size: object, sha256: object) -> int | None:
    """The size of a file in a list; None where the entry cannot be that of a file."""
    digest = sha256 is None or (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None)
    if any(part in ("", ".", "..") for part in name.split("/")) or re.search(r"[\\\x00-\x1f]", name) or not digest:
        return None
    return size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None


class HubFiles:
    """A commit's files, read where they are. Weights are never stored here; a small file is, when it is asked for.

    A missing file is KeyError (or None, or nothing). InputError: this account may not read; StoreError: the hub failed
    until the end of the retries.
    """

    divisible = True
    #: There is no directory with all of them.
    path = None

    def __init__(self, commit: HubCommit, *, seconds: float = RETRY_SECONDS) -> None:
        """`seconds` bounds the retries of one request."""
        self.commit = commit
        self.uri = commit.uri
        self._seconds = seconds
        self._cached = commit.cached
        self._ranged = {name: self._remote(name, file.size) for name, file in commit.files.items()}

    def _remote(self, name: str, size: int) -> RangedFile:
        url = hf_hub_url(self.commit.name, name, revision=self.commit.id)
        commit = self.commit
        return RangedFile(url, uri=self.uri, name=name, page=commit.page, size=size, seconds=self._seconds)

    def probe(self) -> None:
        """Ask for a few bytes of weights; NoRangesError where the hub would send all of them."""
        for name, file in self.commit.weights.items():
            if name not in self._cached and file.size:
                self._ranged[name].get_ranges([(0, min(8, file.size))])
                return

    def get(self, key: str, at_most: int | None = None) -> bytes:
        """The whole file; MalformedError when it has more than `at_most` bytes."""
        size = self._listed(key).size
        if at_most is not None:
            check_length(size, at_most)
        if key.endswith(_WEIGHTS):
            return bytes(memoryview(self.get_ranges(key, [(0, size)])[0]))
        place = self._cached.get(key)
        if place is None or not place.is_file():
            place = self._cached[key] = self._download(key, size)
        return _local(place).get(place.name, at_most)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> builtins.list[Buffer]:
        """Bytes [start, stop) of each range."""
        self._listed(key)
        place = self._cached.get(key)
        if place is not None:
            try:
                return _local(place).get_ranges(place.name, ranges)
            except KeyError:  # the cache was tidied meanwhile
                self._cached.pop(key, None)
        return self._ranged[key].get_ranges(ranges)

    def size(self, key: str) -> int | None:
        """Bytes of a file, or None when there is none."""
        file = self.commit.files.get(key)
        return None if file is None else file.size

    def list(self) -> builtins.list[str]:
        """Every file that belongs to a model, sorted."""
        return sorted(self.commit.files)

    def _listed(self, key: str) -> ListedFile:
        if key not in self.commit.files:
            raise KeyError(key)
        return self.commit.files[key]

    def _download(self, key: str, size: int) -> Path:
        found = retried(
            lambda: Path(hf_hub_download(self.commit.name, key, revision=self.commit.id)),
            uri=self.uri,
            what=f"{key} cannot be read",
            failures=READ_FAILURES,
            diagnose=lambda error: diagnose_reading(error, self.commit.page),
            seconds=self._seconds,
        )
        if found.stat().st_size != size:
            raise StoreError(f"{self.uri}: {key} has {found.stat().st_size:,} bytes, the hub lists {size:,}")
        return found


def _local(file: Path) -> Store:
    return Store(file.parent, create=False)
