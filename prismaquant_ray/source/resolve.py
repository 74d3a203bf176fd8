"""Where a model is: a directory, an object store, or the hub's cache on this machine."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prismaquant_ray.errors import InputError
from prismaquant_ray.parsing import MAX_BYTES, MalformedError, check_volume
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.storage.store import Store

# Files of a hub repository that are fetched: weights in safetensors, and the small files beside them.
_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*")
# Beginnings of the names of the files that libraries read for a tokenizer or a processor.
_OF_LIBRARIES = (
    *("config", "tokenizer", "processor", "preprocessor", "chat_template", "special_tokens", "added_tokens"),
    *("vocab", "merges"),
)


def resolve(source: str, revision: str) -> Store:
    """The store that holds a model; a hub id is fetched into this machine's cache unless it is there.

    Nothing is fetched when HF_HUB_OFFLINE is set.

    Raises:
        InputError: the model is neither a directory nor cached, and cannot be fetched.
    """
    if "://" in source:
        return Store(source, create=False)
    directory = Path(source)
    if directory.is_dir():
        return Store(directory.absolute(), create=False)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(source, revision=revision, allow_patterns=list(_PATTERNS))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise InputError(
            f"model.source {source} on {socket.gethostname()}: neither a directory nor in the hub's cache (revision "
            f"{revision}), nor can it be fetched; give a directory or a URI, or fetch it first: hf download {source}"
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


def small_file(store: Store, name: str) -> bytes:
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
