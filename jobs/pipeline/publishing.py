"""Publishing a finished repository to the hub or an object store, with a comparison after arrival."""

from __future__ import annotations

from dataclasses import dataclass

from prismaquant_ray.errors import InputError
from prismaquant_ray.publishing.bucket import check_bucket, publish_to_bucket
from prismaquant_ray.publishing.finished import FinishedRepository, Listener, Published, open_finished


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRepository:
    """The files sent, already present, and removed at the target; `unlisted` files are not in the manifest.

    `public` is None where a bucket's policy decides.
    """

    source: str
    target: str
    place: str
    public: bool | None
    verified: int
    bytes: int
    bytes_sent: int
    sent: list[str]
    present: list[str]
    removed: list[str]
    unlisted: list[str]


def publish(repository: str, target: str, *, public: bool = False, listener: Listener) -> PublishedRepository:
    """Send the files that are not at the target yet, after checking repository and target.

    Raises:
        InputError: the repository is not complete, or `target` cannot take it.
    """
    _check_target(target, public=public)
    source = open_finished(repository)
    if target.startswith("hf://"):
        published = _to_hub(source, target, listener, public=public)
    else:
        check_bucket(source, target)
        published = publish_to_bucket(source, source.digest(listener), target, listener)
    return PublishedRepository(
        source=repository,
        target=target,
        place=published.place,
        public=published.public,
        verified=len(published.sent) + len(published.present),
        bytes=sum(source.sizes.values()),
        bytes_sent=published.bytes_sent,
        sent=list(published.sent),
        present=list(published.present),
        removed=list(published.removed),
        unlisted=list(source.unlisted),
    )


def _check_target(target: str, *, public: bool) -> None:
    if not target.startswith(("hf://", "s3://", "gs://")):
        raise InputError(f"{target} is no place to publish at; give hf://org/name, s3://bucket/prefix or gs://…")
    if public and not target.startswith("hf://"):
        raise InputError(f"--public is for hf://; who reads {target} is the bucket's policy to say")


def _to_hub(source: FinishedRepository, target: str, listener: Listener, *, public: bool) -> Published:
    # Slow to import, and not needed for buckets.
    from huggingface_hub import HfApi

    from prismaquant_ray.publishing.hub import check_hub, publish_to_hub
    from prismaquant_ray.publishing.hub_client import HubRepository

    repository = HubRepository(target, HfApi(library_name="prismaquant-ray"))
    check_hub(source, repository, public=public)
    return publish_to_hub(source, source.digest(listener), repository, listener, public=public)
