"""Local directories and object-store URIs, and clients configured by the environment.

Credentials and endpoints come from the environment only, never from a URI. Nothing here sends a request.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.store import GCSStore, S3Store

from prismaquant_ray.errors import InputError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# Read timeout in seconds; also bounds the upload of one part.
_SILENCE = 30.0
_LONGEST_REQUEST = 1800.0


def local_path(uri: str) -> Path | None:
    """The directory a URI names when it is local, else None. Raises nothing: unknown schemes are not local."""
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri)


def absolute(uri: str | Path) -> str:
    """The URI or absolute path, valid in any working directory."""
    path = local_path(str(uri))
    return str(uri).rstrip("/") if path is None else str(path.absolute())


@dataclass(frozen=True, slots=True)
class Bucket:
    """A parsed object-store URI."""

    scheme: str
    name: str
    prefix: str


def parse(uri: str) -> Bucket:
    """InputError unless the URI is scheme://bucket/prefix; one that may hold credentials is not repeated."""
    scheme, _, rest = uri.partition("://")
    if scheme not in ("s3", "gs"):
        raise InputError(f"{scheme}:// is not supported; give a directory, s3://bucket/prefix or gs://bucket/prefix")
    name, _, prefix = rest.partition("/")
    if any(character in name for character in "@:") or any(character in rest for character in "?#"):
        raise InputError(
            f"a {scheme}:// URI is {scheme}://bucket/prefix, without credentials, port or parameters; credentials "
            "and the endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …)"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", name):
        raise InputError(f"{uri!r} names no bucket; give {scheme}://bucket/prefix")
    prefix = prefix.rstrip("/")
    if prefix and any(segment in ("", ".", "..") for segment in prefix.split("/")):
        raise InputError(f"{uri!r} has an empty, '.' or '..' part; give {scheme}://bucket/prefix")
    return Bucket(scheme, name, prefix)


def connect(bucket: Bucket, *, seconds: float, retries: int) -> ObjectStore:
    """A client of the bucket, configured by the environment; sends no request."""
    # The client repeats single requests for half of the time, so that a transfer can be begun anew as a whole.
    longest = min(5.0, seconds / 8)
    retry: RetryConfig = {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=seconds / 2),
        "backoff": {
            # Above the longest, the client panics.
            "init_backoff": timedelta(seconds=min(0.3, longest / 2)),
            "max_backoff": timedelta(seconds=longest),
            "base": 2,
        },
    }
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=min(_SILENCE, seconds / 2)),
        "timeout": timedelta(seconds=_LONGEST_REQUEST),
    }
    prefix = bucket.prefix or None
    if bucket.scheme == "gs":
        return GCSStore(bucket.name, prefix=prefix, retry_config=retry, client_options=client)
    options: dict[str, Any] = {}
    endpoint = _endpoint()
    if endpoint is not None:
        options["endpoint"] = endpoint
        if endpoint.startswith("http://"):
            client["allow_http"] = True
    if os.environ.get("AWS_PROFILE") and not os.environ.get("AWS_ACCESS_KEY_ID"):
        options["credential_provider"] = _profile(os.environ["AWS_PROFILE"])
    return S3Store(bucket.name, prefix=prefix, retry_config=retry, client_options=client, **options)


def _endpoint() -> str | None:
    """The S3 endpoint of the environment; None means AWS."""
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        endpoint = os.environ.get(variable)
        if not endpoint:
            continue
        if not re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", endpoint):
            raise InputError(f"{variable} must be http://host:port or https://host, without credentials or parameters")
        return endpoint.rstrip("/")
    return None


def _profile(name: str) -> Any:
    """Credentials of a profile in ~/.aws, refreshed by boto3."""
    try:
        import boto3  # type: ignore[import-not-found, unused-ignore]
        from botocore.exceptions import BotoCoreError  # type: ignore[import-not-found, unused-ignore]
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise InputError(
            f"AWS_PROFILE is {name}, and profiles need boto3; pip install boto3, or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY instead"
        ) from error
    try:
        return Boto3CredentialProvider(boto3.Session())
    except (BotoCoreError, ValueError) as error:
        raise InputError(f"AWS_PROFILE {name}: no such profile, or one without credentials; see ~/.aws") from error
