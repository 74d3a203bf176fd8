"""Publishing to the Hugging Face hub: private unless asked otherwise, and never half a repository for readers.

A new repository takes three commits: a claim with the small files, the weights, and then what makes them a model
(manifest, index, config.json), after what the hub says of the weights was compared. A repository that is a model
already is replaced in one commit. The bytes of weights are stored before the commit that names them, so an interrupted
upload goes on where it stopped. What the hub lists, sizes and digests, is what is compared: it checks bytes against
digests when they arrive, and nothing is downloaded again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from prismaquant_ray.checkpoint.shards import CONFIG, MANIFEST, is_dequantized
from prismaquant_ray.errors import InputError, ResourceError, StoreError
from prismaquant_ray.publishing.hub_client import HubRepository, Snapshot, quiet
from prismaquant_ray.publishing.published import Published
from prismaquant_ray.publishing.source import LAST, PIECE, File, Listener, Source

# The hub puts it into every new repository.
_OF_THE_HUB = ".gitattributes"


def check_hub(source: Source, repository: HubRepository, *, public: bool) -> None:
    """Within seconds: InputError or StoreError unless the repository may be put there. Nothing is made."""
    repository = repository.hasty()
    with quiet():
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


def publish_to_hub(
    source: Source, files: Sequence[File], repository: HubRepository, listener: Listener, *, public: bool
) -> Published:
    """Bring the repository to exactly these files, beside those that others put there.

    InputError when the target holds something else or is public and `public` is false; StoreError after the retries,
    or when what arrived is not what was sent.
    """
    with quiet():
        return _publish(source, files, repository, listener, public=public)


def _publish(
    source: Source, files: Sequence[File], repository: HubRepository, listener: Listener, *, public: bool
) -> Published:
    before = repository.look()
    if before is None:
        repository.create()
        before = _look(repository)
    listed = _check_free(source, repository, before, public=public)
    is_model = CONFIG in before.files
    missing = [file for file in files if not _has(before, file) or (file.name in LAST and not is_model)]
    names = {file.name for file in files}
    removed = [name for name in before.files if name in listed and name not in names]

    small = [file for file in missing if not source.is_weights(file.name) and file.name not in LAST]
    weights = [file for file in missing if source.is_weights(file.name)]
    if missing:
        listener.begin("sending", len(missing), sum(file.size for file in missing))
    if is_model:
        if missing or removed:
            operations = _uploaded(source, weights, repository, listener)
            others = [file for file in missing if file not in weights]
            operations += _operations(source, others)
            repository.commit("Replace the model", operations, removed, before.commit)
            _tell(listener, others)
    else:
        claim = source.claim(listed)
        if small or not _has(before, File.of(MANIFEST, claim)):
            operations = [*_operations(source, small), CommitOperationAdd(MANIFEST, claim)]
            repository.commit("Begin to publish", operations, (), before.commit)
            before = _look(repository)
            _tell(listener, small)
        if weights:
            repository.commit("Add the weights", _uploaded(source, weights, repository, listener), (), before.commit)
            before = _look(repository)
        # Not before they are right do they become a model.
        _check_all(repository, before, [file for file in files if file.name not in LAST])
        last = [file for file in missing if file.name in LAST]
        repository.commit("Make it a model", _operations(source, last), removed, before.commit)
        _tell(listener, last)
    after = _look(repository)
    _check_all(repository, after, files)
    if public and after.private:
        repository.make_public()
        after = _look(repository)
    return Published(
        place=repository.url,
        sent=tuple(file.name for file in missing),
        present=tuple(file.name for file in files if file not in missing),
        removed=tuple(removed),
        bytes_sent=sum(file.size for file in missing),
        public=not after.private,
    )


# The target -----------------------------------------------------------------------------------------------------


def _check_free(source: Source, repository: HubRepository, snapshot: Snapshot, *, public: bool) -> Mapping[str, int]:
    """The files that a manifest of ours there names; InputError when something else is there, or all can see it."""
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
        listed = json.loads(manifest)["files"]
    except (ValueError, KeyError, TypeError):
        listed = None
    if not isinstance(listed, dict):
        raise InputError(f"{repository.uri} holds something else (its {MANIFEST} is not ours); choose another name")
    if is_dequantized(manifest) != source.dequantized:
        kind = "a quantized" if source.dequantized else "a dequantized"
        raise InputError(f"{repository.uri} holds {kind} repository; choose another name")
    return listed


def _look(repository: HubRepository) -> Snapshot:
    snapshot = repository.look()
    if snapshot is None:
        raise StoreError(f"{repository.uri} cannot be seen with this token; check the name, or whether it was removed")
    return snapshot


def _has(snapshot: Snapshot, file: File) -> bool:
    return file.name in snapshot.files and snapshot.files[file.name].is_same(file)


def _check_all(repository: HubRepository, snapshot: Snapshot, files: Sequence[File]) -> None:
    """StoreError unless the hub lists every file with its size and digest."""
    wrong = [file.name for file in files if not _has(snapshot, file)]
    if wrong:
        first = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise StoreError(
            f"{repository.uri}: {first}: the hub does not list what was sent (missing, or another size or digest); run "
            "the same command again to continue"
        )


# Sending --------------------------------------------------------------------------------------------------------


def _operations(source: Source, files: Sequence[File]) -> list[CommitOperationAdd]:
    """Small files as they are to be committed."""
    return [CommitOperationAdd(file.name, source.get(file)) for file in files]


def _uploaded(
    source: Source, files: Sequence[File], repository: HubRepository, listener: Listener
) -> list[CommitOperationAdd]:
    """Files that are at the hub, one after the other, but in no commit yet."""
    operations = []
    for file in files:
        with _content(source, file) as content:
            operation = CommitOperationAdd(file.name, content)
            repository.upload(operation)
        operations.append(operation)
        _tell(listener, [file])
    return operations


@contextmanager
def _content(source: Source, file: File) -> Iterator[Path | bytes]:
    """What the client uploads: bytes, or a path. A large file of an object store is copied to this machine's disk."""
    if file.size <= PIECE:  # the hub may take it into git itself, when it is committed
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


def _check_room(source: Source) -> None:
    largest = max(source.sizes.values())
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if largest > free:
        raise ResourceError(
            f"not enough disk at {tempfile.gettempdir()}: a file of {largest / 1e9:.2f} GB passes through it, "
            f"{free / 1e9:.2f} GB are free; set TMPDIR to another place"
        )
