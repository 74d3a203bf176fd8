"""Where a model is: a directory, an object store, the hub, or the hub's cache on this machine."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.formatting import gigabytes
from prismaquant_ray.parsing import MAX_BYTES, MalformedError, check_volume
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.storage.prefix import Files
from prismaquant_ray.storage.store import Store

_LOG = logging.getLogger(__name__)
# Beginnings of the names of the files that libraries read for a tokenizer or a processor.
_OF_LIBRARIES = (
    *("config", "tokenizer", "processor", "preprocessor", "chat_template", "special_tokens", "added_tokens"),
    *("vocab", "merges"),
)


def on_hub(source: str) -> bool:
    """Whether a source is a name on the hub: neither a URI nor a directory here."""
    return "://" not in source and not Path(source).is_dir()


def resolve(source: str, revision: str, say: Callable[[str], None] = _LOG.warning) -> Files:
    """The files of a model: a directory, an object store, or a commit on the hub.

    Of a hub id weights are read by byte ranges, unless this machine's cache has all of them. The whole snapshot is
    fetched into the cache, and `say` told so, where a server answers no ranges. Nothing is fetched when HF_HUB_OFFLINE
    is set; the cache is also used, and `say` told so, while the hub does not answer.

    Raises:
        InputError: the model is neither a directory nor on the hub for this account, nor in its cache.
        StoreError: the hub does not answer, and its cache does not have the model.
    """
    if "://" in source:
        return Store(source, create=False)
    if not on_hub(source):
        return Store(Path(source).absolute(), create=False)
    from huggingface_hub import constants

    from prismaquant_ray.source.hub import HubFiles, commit_of
    from prismaquant_ray.source.hub_ranges import NoRangesError

    if constants.is_offline_mode():
        return _snapshot(source, revision)
    try:
        commit = commit_of(source, revision, place=_place(source))
    except StoreError as error:
        try:
            found = _snapshot(source, revision, cached=True)
        except InputError:
            raise error from None
        say(f"{error}; what the hub's cache on this machine has is read instead")
        return found
    if commit.weights.keys() <= commit.cached.keys():
        return _snapshot(source, commit.id)
    files = HubFiles(commit)
    try:
        files.probe()
    except NoRangesError:
        size = sum(file.size for file in commit.files.values())
        say(
            f"{source}: the server of its weights does not answer byte ranges, so every machine that reads them "
            f"fetches all {gigabytes(size)} into its cache first"
        )
        return _snapshot(source, commit.id)
    return files


def pinned(source: str, revision: str, files: Files) -> str:
    """The commit that a hub id was resolved to, which others are to read, too; else the revision as it is."""
    if not on_hub(source):
        return revision
    from prismaquant_ray.source.hub import HubFiles

    if isinstance(files, HubFiles):
        return files.commit.id
    assert files.path is not None
    return files.path.name


def _place(source: str) -> str:
    return f"model.source {source} on {socket.gethostname()}"


def _snapshot(source: str, revision: str, *, cached: bool = False) -> Store:
    """A directory of the hub's cache with the whole model; only one that is there already where `cached`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from prismaquant_ray.source.hub import MODEL_FILES

    try:
        found = snapshot_download(source, revision=revision, allow_patterns=[*MODEL_FILES], local_files_only=cached)
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise InputError(
            f"{_place(source)}: neither a directory nor in the hub's cache (revision {revision}), nor can it be "
            f"fetched; give a directory or a URI, or fetch it first: hf download {source}"
        ) from error
    return Store(Path(found), create=False)


@contextmanager
def local_files(checkpoint: TensorSource) -> Iterator[Path]:
    """A directory with the model's small files (tokenizer, configuration), for libraries that want a path.

    Raises:
        InputError: a file that libraries read is too large. StoreError for what is no file: they would wait for it.
    """
    _check_small_files(checkpoint)
    if checkpoint.store.path is not None:
        yield checkpoint.store.path
        return
    with tempfile.TemporaryDirectory(prefix="prismaquant-") as directory:
        for name in checkpoint.other_files():
            file = Path(directory) / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(checkpoint.store.get(name))
        yield Path(directory)


def small_file(store: Files, name: str) -> bytes:
    """A file of a model that is no weights; KeyError when there is none, InputError when it is too large.

    Libraries read it by themselves, and have no bounds.
    """
    try:
        data = store.get(name, MAX_BYTES)
        if name.endswith(".json"):
            check_volume(data)
    except MalformedError as error:
        raise InputError(f"{store.uri}: {name} {error}; fetch it again") from error
    return data


def _check_small_files(checkpoint: TensorSource) -> None:
    # Beside the files of the store what only a directory can have.
    path = checkpoint.store.path
    names = {*checkpoint.other_files(), *(() if path is None else (entry.name for entry in path.iterdir()))}
    for name in sorted(name for name in names if name.startswith(_OF_LIBRARIES)):
        with suppress(KeyError):  # a folder
            small_file(checkpoint.store, name)
