"""The run store of a model's passes, by unit: its keys, its records, and how they are forgotten.

Two records per unit: `record.json` for its candidates or prices, `boundary.json` for its output, which exists only at
the end of a shard and only until it has been used. Either may be missing; `shards` plans the remaining work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from actors.schedule.units import PASSES, Stage, Unit, unit_key, unit_of
from prismaquant_ray.errors import DamagedError, StoreError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.parsing import MAX_BYTES, MalformedError, as_object
from prismaquant_ray.records import (
    BOUNDARY,
    FACTORS,
    LAYOUT,
    MEASURED,
    RECORD,
    RUN,
    MeasuredRecord,
    boundary_key,
    record_key,
)
from prismaquant_ray.serialization import from_bytes, from_json, to_json
from prismaquant_ray.storage.prefix import get_json
from prismaquant_ray.storage.record import Artifact, Record, read_record, write_record
from prismaquant_ray.storage.store import Store

T = TypeVar("T")

#: Concurrent requests of one process.
REQUESTS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """The units of one pass that have a record, and those whose output is in the store."""

    done: frozenset[Unit]
    boundaries: frozenset[Unit]


class RunStore:
    """The records of one run store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def run(self) -> str:
        """What every record says that it is of: a digest of what `run.json` says, nothing where there is none.

        Raises:
            StoreError: `run.json` cannot be read.
        """
        try:
            body = as_object(get_json(self.store, RUN, finite=True))
        except KeyError:
            return ""
        except MalformedError as error:
            raise StoreError(f"{self.store.uri}: {RUN} {error}; choose another store.run") from error
        said = json.dumps(body.get("fingerprint", body), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def layout(self) -> Layout | None:
        """The stored layout; None when there is none that can be read: it can be built again."""
        try:
            record = read_record(self.store, LAYOUT, run=self.run)
            return None if record is None else from_json(Layout, record.metrics)
        except (DamagedError, ValueError):
            return None

    def write_layout(self, layout: Layout) -> None:
        """Store a layout in place of what may be there."""
        self.store.delete([LAYOUT])
        write_record(self.store, LAYOUT, Record(metrics=to_json(layout)), run=self.run)

    @property
    def measured(self) -> MeasuredRecord | None:
        """`measured.json`; None when it cannot be read, too: it is made again from the records, which are there."""
        try:
            return from_bytes(MeasuredRecord, self.store.get(MEASURED, MAX_BYTES))
        except (KeyError, ValueError):
            return None

    def recorded(self, stage: Stage) -> Recorded:
        """The recorded units of a pass, found by one listing."""
        found: dict[str, set[Unit]] = {RECORD: set(), BOUNDARY: set()}
        for key in self.store.list(str(stage)):
            _, name, *rest = key.split("/")
            if len(rest) == 1 and rest[0] in found:
                found[rest[0]].add(unit_of(name))
        return Recorded(done=frozenset(found[RECORD]), boundaries=frozenset(found[BOUNDARY]))

    def record(self, stage: Stage, unit: Unit) -> Record:
        """Candidates or prices of a unit; DamagedError when they are not there."""
        return self._read(record_key(stage, unit_key(unit)))

    def records(self, stage: Stage, units: Iterable[Unit]) -> dict[Unit, Record]:
        """The records of many units; object stores are slow per request, so several are read at once."""
        units = list(units)
        with ThreadPoolExecutor(REQUESTS, thread_name_prefix="records") as threads:
            return dict(zip(units, threads.map(lambda unit: self.record(stage, unit), units), strict=True))

    def typed(self, kind: type[T], stage: Stage, records: Mapping[int, Record]) -> dict[int, T]:
        """The metrics of each block's record as a `kind`; DamagedError when they do not fit it."""
        found = {}
        for block, record in records.items():
            try:
                found[block] = from_json(kind, record.metrics)
            except ValueError as error:
                key = record_key(stage, unit_key(block))
                raise DamagedError(f"{self.store.uri}: {key}: {error}; run the same command again", key) from error
        return found

    def candidates(self, block: int) -> dict[FormatName, Artifact]:
        """The stored candidates of a block, by format."""
        artifacts = self.record(Stage.FORWARD, block).artifacts
        return {FormatName(name): artifact for name, artifact in artifacts.items() if name != FACTORS}

    def boundary(self, stage: Stage, unit: Unit) -> dict[int, Artifact]:
        """The stored output of a unit, by microbatch; DamagedError when it has no record."""
        record = self._read(boundary_key(stage, unit_key(unit)))
        return {int(microbatch): artifact for microbatch, artifact in record.artifacts.items()}

    def write_record(self, stage: Stage, unit: Unit, record: Record) -> None:
        """Commit a unit's candidates or prices; the first writer wins."""
        write_record(self.store, record_key(stage, unit_key(unit)), record, run=self.run)

    def write_boundary(self, stage: Stage, unit: Unit, artifacts: Mapping[int, Artifact]) -> None:
        """Commit the output of a unit for every microbatch that it takes."""
        named = {str(microbatch): artifact for microbatch, artifact in sorted(artifacts.items())}
        write_record(self.store, boundary_key(stage, unit_key(unit)), Record(artifacts=named), run=self.run)

    def drop_boundary(self, stage: Stage, unit: Unit) -> None:
        """Delete a boundary that nothing needs any more; the record first, so that it never names deleted objects."""
        key = boundary_key(stage, unit_key(unit))
        record = read_record(self.store, key, run=self.run)
        if record is not None:
            self.store.delete([key])
            self.store.delete(artifact.key for artifact in record.artifacts.values())

    def forget(self, key: str) -> list[str]:
        """Delete every record that names the damaged object `key` or is that object; the keys deleted."""
        directory = "/".join(key.split("/")[:2])
        deleted = []
        for name in (RECORD, BOUNDARY):
            candidate = f"{directory}/{name}"
            if candidate == key or self._names(candidate, key):
                deleted.append(candidate)
        self.store.delete(deleted)
        return deleted

    def tidy(self) -> None:
        """Delete everything that no record of a finished run names: boundaries, and data of interrupted attempts."""
        for stage in PASSES:
            kept = set()
            for unit, record in self.records(stage, self.recorded(stage).done).items():
                kept.add(record_key(stage, unit_key(unit)))
                kept |= {artifact.key for artifact in record.artifacts.values()}
            self.store.delete(key for key in self.store.list(str(stage)) if key not in kept)

    def _names(self, record_key: str, key: str) -> bool:
        try:
            record = read_record(self.store, record_key, run=self.run)
        except DamagedError:
            return True
        return record is not None and any(artifact.key == key for artifact in record.artifacts.values())

    def _read(self, key: str) -> Record:
        record = read_record(self.store, key, run=self.run)
        if record is None:
            raise DamagedError(f"{self.store.uri}: {key} is missing; run the same command again", key)
        return record
