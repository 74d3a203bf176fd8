"""Artifacts and records: the commit protocol of finished work.

Data goes to keys no other attempt uses; then a record that names it, with sizes and digests, is created only if
absent. The first record wins, so two attempts cannot mix, and data without a record does not exist.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING
from uuid import uuid4

from prismaquant_ray.errors import DamagedError, StoreError
from prismaquant_ray.parsing import MalformedError, as_object
from prismaquant_ray.records import Json
from prismaquant_ray.storage.prefix import get_json
from prismaquant_ray.storage.store import Store

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Buffer

SCHEMA = 3
_DIGEST = "sha256"


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A stored object with its expected size and digest."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A finished unit of work: its artifacts by name, and metrics small enough for JSON (stored as `facts`)."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    metrics: dict[str, Json] = field(default_factory=dict)


def new_attempt() -> str:
    """A key segment that no other attempt has."""
    return uuid4().hex[:12]


def write_artifact(store: Store, key: str, data: Buffer) -> Artifact:
    """Store bytes; their artifact."""
    view = memoryview(data)
    artifact = Artifact(key=key, size=view.nbytes, sha256=hashlib.sha256(view).hexdigest())
    store.put(key, view)
    return artifact


def write_tensors(store: Store, key: str, tensors: Mapping[str, Tensor]) -> Artifact:
    """Store tensors as one safetensors object."""
    from safetensors.torch import save

    return write_artifact(store, key, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_artifact(store: Store, artifact: Artifact) -> bytes:
    """The bytes of an artifact, verified; DamagedError when they are missing or have another size or digest."""
    try:
        data = store.get(artifact.key)
    except KeyError as error:
        raise damaged(store, artifact, "is missing") from error
    if len(data) != artifact.size:
        raise damaged(store, artifact, f"has {len(data)} bytes, {artifact.size} recorded")
    if hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise damaged(store, artifact, "has another digest than recorded")
    return data


def damaged(store: Store, artifact: Artifact, what: str) -> DamagedError:
    """The error for an artifact that does not match its record."""
    return DamagedError(f"{store.uri}: {artifact.key} {what}; run the same command again to repair it", artifact.key)


def read_tensors(store: Store, artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of a safetensors artifact, verified."""
    from safetensors.torch import load

    return load(read_artifact(store, artifact))


def write_record(store: Store, key: str, record: Record, *, run: str = "") -> bool:
    """Create the record unless one exists; False when another attempt was first.

    `run` says which run it is of, where its key does not.
    """
    artifacts = {name: asdict(artifact) for name, artifact in record.artifacts.items()}
    body = {"schema": SCHEMA, "run": run, "key": key, "artifacts": artifacts, "facts": record.metrics}
    return store.create(key, json.dumps({**body, _DIGEST: _digest(body)}, indent=1, allow_nan=False).encode())


def read_record(store: Store, key: str, *, run: str = "") -> Record | None:
    """The record, or None when the work has not been done.

    Raises:
        DamagedError: it is not as it was written, or was written for another key or run.
    """
    try:
        body = as_object(get_json(store, key, finite=True))
    except KeyError:
        return None
    except MalformedError as error:
        raise DamagedError(f"{store.uri}: {key} {error}; run the same command again to repair it", key) from error
    # The digest catches damage that is still valid JSON.
    if body.pop(_DIGEST, None) != _digest(body):
        raise DamagedError(f"{store.uri}: {key} is not what was written; run the same command again to repair it", key)
    if body.get("schema", SCHEMA) != SCHEMA:
        raise StoreError(f"{store.uri}: {key} has schema {body['schema']!r}; this version reads {SCHEMA}")
    if (body.get("run"), body.get("key")) != (run, key):
        raise DamagedError(f"{store.uri}: {key} is of another run; run the same command again to repair it", key)
    try:
        artifacts = {name: Artifact(**entry) for name, entry in body["artifacts"].items()}
        return Record(artifacts=artifacts, metrics=body["facts"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{store.uri}: {key} is malformed; run the same command again to repair it", key) from error


def _digest(body: Mapping[str, object]) -> str:
    """SHA-256 of everything else in a record, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
