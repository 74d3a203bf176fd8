"""Publishing to s3:// or gs://: every object is read back and compared, and config.json is written last.

Objects already present are read as well, because stores have no common digest that a client could ask for. While an
earlier version is replaced there is no config.json, so readers never see a mixture of two versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.parsing import parse_object
from prismaquant_ray.publishing.finished import Digests, File, FinishedRepository, Listener, Published, pieces
from prismaquant_ray.repository.manifest import MANIFEST, claim
from prismaquant_ray.repository.staging import LAST, check_output, staged_output
from prismaquant_ray.storage.connection import absolute
from prismaquant_ray.storage.prefix import ByteWriter
from prismaquant_ray.storage.store import Store


def check_bucket(source: FinishedRepository, target: str) -> None:
    """Check within seconds that the repository may be written to `target`.

    Raises:
        InputError: something else is there, or source and target overlap.
        StoreError: the target cannot be written.
    """
    if source.store.path is None:
        places = absolute(source.store.uri).split("/"), absolute(target).split("/")
        if all(left == right for left, right in zip(*places, strict=False)):
            raise InputError(
                f"{target} and {source.store.uri} are one place, or one lies in the other; choose another target"
            )
    check_output(target, dequantized=source.dequantized)
    Store(target).check_writable()


def publish_to_bucket(source: FinishedRepository, files: Sequence[File], target: str, listener: Listener) -> Published:
    """Copy the files that are not at the target yet.

    Raises:
        InputError: the target holds something else.
        StoreError: a request failed after all retries, or a file did not arrive intact.
    """
    check_output(target, dequantized=source.dequantized)
    remote = Store(target)
    before = set(remote.list())
    common = [file for file in files if file.name in before and remote.size(file.name) == file.size]
    if common:
        listener.begin("comparing", len(common), sum(file.size for file in common))
    present = [file for file in common if _arrived(remote, file, listener)]
    if len(present) == len(files):
        return source.published(target, target, public=None, sent=(), present=present, removed=())

    sent = [file for file in files if file not in present or file.name in LAST]
    listener.begin("sending and reading back", len(sent), 2 * sum(file.size for file in sent))
    with staged_output(target) as staging:
        stale = claim(staging, parse_object(source.claim(())))
        staging.put(MANIFEST, source.claim(stale))
        for file in sent:
            if file.name in LAST:
                staging.put(file.name, source.get(file))  # held back until the end of the block
            else:
                staging.upload(file.name, partial(_copy, source, file, listener))
                _check_arrived(remote, file, listener)
        removed = before.intersection(stale).difference(file.name for file in files)
        staging.delete(removed)
    for name in LAST:
        file = next(file for file in sent if file.name == name)
        listener.advance(file.size)
        _check_arrived(remote, file, listener)
    present = [file for file in present if file not in sent]
    return source.published(target, target, public=None, sent=sent, present=present, removed=sorted(removed))


def _copy(source: FinishedRepository, file: File, listener: Listener, writer: ByteWriter) -> None:
    source.copy(file, writer.write, listener.advance)


def _check_arrived(remote: Store, file: File, listener: Listener) -> None:
    if not _arrived(remote, file, listener):
        raise StoreError(
            f"{remote.uri}: {file.name} is not there as it was sent, by what was read back; run the same command again "
            "to continue"
        )
    listener.done(file.name, "sent and read back", file.size)


def _arrived(remote: Store, file: File, listener: Listener) -> bool:
    """Whether the target has exactly the bytes of a file, by reading them."""
    if remote.size(file.name) != file.size:
        return False
    digests = Digests(file.size)
    try:
        for piece in pieces(remote, file.name, file.size):
            digests.update(piece)
            listener.advance(len(piece))
    except KeyError:
        return False
    return digests.file(file.name) == file
