"""Publishing to the Hugging Face hub: private by default, and atomic for readers.

Weights are uploaded first, shard by shard. Then one commit adds and removes all files, so readers see either the old or
the new version, and an interrupted upload resumes. At the end the sizes and digests that the hub lists are compared;
nothing is downloaded, because the hub verifies digests on arrival.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from prismaquant_ray.errors import InputError, ResourceError, StoreError
from prismaquant_ray.parsing import MalformedError
from prismaquant_ray.publishing.finished import PIECE, File, FinishedRepository, Listener, Published
from prismaquant_ray.publishing.hub_client import HubRepository, Snapshot, quiet
from prismaquant_ray.repository.manifest import MANIFEST, README, read_manifest

# The hub adds this file to every new repository.
_OF_THE_HUB = ".gitattributes"


@quiet()
def check_hub(source: FinishedRepository, repository: HubRepository, *, public: bool) -> None:
    """Check within seconds that the repository may be published there; creates nothing.

    Raises:
        InputError: the token may not write there, or the target is public or holds something else.
        ResourceError: the temporary directory is too small.
        StoreError: the hub cannot be reached.
    """
    repository = repository.hasty()
    owners = repository.check_token()
    snapshot = repository.look()
    owner = repository.id.partition("/")[0]
    if snapshot is not None:
        _check_free(source, repository, snapshot, public=public)
    elif owners is not None and owner not in owners:
        raise InputError(
            f"{repository.uri} does not exist and this token may not make it: it is for {', '.join(sorted(owners))}"
        )
    if source.store.path is None:
        _check_room(source)


@quiet()
def publish_to_hub(
    source: FinishedRepository, files: Sequence[File], repository: HubRepository, listener: Listener, *, public: bool
) -> Published:
    """Make the repository hold these files, beside files that others added.

    Raises:
        InputError: the target holds something else, or is public and `public` is false.
        StoreError: a request failed after all retries, or a file did not arrive intact.
    """
    before = repository.look()
    if before is None:
        repository.create()
        before = _look(repository)
    listed = _check_free(source, repository, before, public=public)
    missing = [file for file in files if not _has(before, file)]
    names = {file.name for file in files}
    removed = [name for name in before.files if name in listed and name not in names]
    if missing or removed:
        listener.begin("sending", len(missing), sum(file.size for file in missing))
        small = [file for file in missing if not source.is_weights(file.name)]
        weights = [file for file in missing if source.is_weights(file.name)]
        card = next((file for file in small if file.name == README), None)
        if card is not None:  # invalid front matter is reported before hours of uploading
            repository.check_card(source.get(card).decode("utf-8", "replace"))
        additions = _uploaded(source, weights, repository, listener)
        additions += [CommitOperationAdd(file.name, source.get(file)) for file in small]
        repository.commit("Publish the model", additions, removed, before.commit)
        _tell(listener, small)
    after = _look(repository)
    _check_all(repository, after, files)
    if public and after.private:
        repository.make_public()
        after = _look(repository)
    present = [file for file in files if file not in missing]
    return source.published(
        repository.uri, repository.url, public=not after.private, sent=missing, present=present, removed=removed
    )


# The target -----------------------------------------------------------------------------------------------------


def _check_free(
    source: FinishedRepository, repository: HubRepository, snapshot: Snapshot, *, public: bool
) -> Mapping[str, int]:
    """Files that our manifest at the target lists; InputError if it holds something else or is public."""
    if not snapshot.private and not public:
        raise InputError(
            f"{repository.uri} exists and is public; add --public to publish there for everybody, or make it private "
            "in its settings first"
        )
    others = sorted(name for name in snapshot.files if name != _OF_THE_HUB)
    if not others:
        return {}
    if MANIFEST not in others:
        raise InputError(f"{repository.uri} holds something else ({others[0]}); choose another name or empty it")
    manifest = repository.get(MANIFEST, snapshot.commit)
    try:
        there = read_manifest(manifest)
    except MalformedError as error:
        raise InputError(
            f"{repository.uri} holds something else (its {MANIFEST} {error}); choose another name"
        ) from error
    if there.dequantized != source.dequantized:
        kind = "a quantized" if source.dequantized else "a dequantized"
        raise InputError(f"{repository.uri} holds {kind} repository; choose another name")
    return there.files


def _look(repository: HubRepository) -> Snapshot:
    snapshot = repository.look()
    if snapshot is None:
        raise StoreError(f"{repository.uri} cannot be seen with this token; check the name, or whether it was removed")
    return snapshot


def _has(snapshot: Snapshot, file: File) -> bool:
    return file.name in snapshot.files and snapshot.files[file.name].is_same(file)


def _check_all(repository: HubRepository, snapshot: Snapshot, files: Sequence[File]) -> None:
    """Raise StoreError unless the hub lists every file with its size and digest."""
    wrong = [file.name for file in files if not _has(snapshot, file)]
    if wrong:
        first = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise StoreError(
            f"{repository.uri}: {first}: the hub does not list what was sent (missing, or another size or digest); run "
            "the same command again to continue"
        )


# Sending --------------------------------------------------------------------------------------------------------


def _uploaded(
    source: FinishedRepository, files: Sequence[File], repository: HubRepository, listener: Listener
) -> list[CommitOperationAdd]:
    """Upload files one after the other, without a commit."""
    operations = []
    for file in files:
        with _content(source, file) as content:
            operation = CommitOperationAdd(file.name, content)
            repository.upload(operation)
        operations.append(operation)
        _tell(listener, [file])
    return operations


@contextmanager
def _content(source: FinishedRepository, file: File) -> Iterator[Path | bytes]:
    """Bytes or path to upload; a large file in an object store is first copied to the local disk."""
    if file.size <= PIECE:  # the hub may store it in git, as part of the commit
        yield source.get(file)
    elif source.store.path is not None:
        yield source.store.path / file.name
    else:
        with tempfile.TemporaryDirectory(prefix="prismaquant-") as directory:
            path = Path(directory) / "weights"
            with path.open("wb") as target:
                source.copy(file, target.write, lambda _: None)
            yield path


def _tell(listener: Listener, files: Sequence[File]) -> None:
    for file in files:
        listener.advance(file.size)
        listener.done(file.name, "sent", file.size)


def _check_room(source: FinishedRepository) -> None:
    largest = max(source.sizes.values())
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if largest > free:
        raise ResourceError(
            f"not enough disk at {tempfile.gettempdir()}: a file of {largest / 1e9:.2f} GB passes through it, "
            f"{free / 1e9:.2f} GB are free; set TMPDIR to another place"
        )
