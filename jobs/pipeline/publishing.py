"""Publishing a finished repository to the hub or an object store, with a comparison after arrival."""

from __future__ import annotations

from prismaquant_ray.errors import InputError
from prismaquant_ray.publishing.bucket import check_bucket, publish_to_bucket
from prismaquant_ray.publishing.finished import FinishedRepository, Listener, Published, open_finished


def publish(repository: str, target: str, *, public: bool = False, listener: Listener) -> Published:
    """Send the files that are not at the target yet, after checking repository and target.

    Raises:
        InputError: the repository is not complete, or `target` cannot take it.
    """
    if not target.startswith(("hf://", "s3://", "gs://")):
        raise InputError(f"{target} is no place to publish at; give hf://org/name, s3://bucket/prefix or gs://…")
    if target.startswith("hf://"):
        return _to_hub(open_finished(repository), target, listener, public=public)
    if public:
        raise InputError(f"--public is for hf://; who reads {target} is the bucket's policy to say")
    source = open_finished(repository)
    check_bucket(source, target)
    return publish_to_bucket(source, source.digest(listener), target, listener)


def _to_hub(source: FinishedRepository, target: str, listener: Listener, *, public: bool) -> Published:
    # Slow to import, and not needed for buckets.
    from huggingface_hub import HfApi

    from prismaquant_ray.publishing.hub import check_hub, publish_to_hub
    from prismaquant_ray.publishing.hub_client import HubRepository

    repository = HubRepository(target, HfApi(library_name="prismaquant-ray"))
    check_hub(source, repository, public=public)
    return publish_to_hub(source, source.digest(listener), repository, listener, public=public)
