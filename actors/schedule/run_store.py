"""The run store of a model's passes, by unit: its keys, its records, and how they are forgotten.

Two records per unit: `record.json` for its candidates or prices, `boundary.json` for its output, which exists only at
the end of a shard and only until it has been used. Either may be missing; `shards` plans the remaining work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from actors.schedule.units import PASSES, Stage, Unit, unit_key, unit_of
from prismaquant_ray.errors import DamagedError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.records import BOUNDARY, FACTORS, RECORD, boundary_key, record_key
from prismaquant_ray.serialization import from_json
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
        write_record(self.store, record_key(stage, unit_key(unit)), record)

    def write_boundary(self, stage: Stage, unit: Unit, artifacts: Mapping[int, Artifact]) -> None:
        """Commit the output of a unit for every microbatch that it takes."""
        named = {str(microbatch): artifact for microbatch, artifact in sorted(artifacts.items())}
        write_record(self.store, boundary_key(stage, unit_key(unit)), Record(artifacts=named))

    def drop_boundary(self, stage: Stage, unit: Unit) -> None:
        """Delete a boundary that nothing needs any more; the record first, so that it never names deleted objects."""
        key = boundary_key(stage, unit_key(unit))
        record = read_record(self.store, key)
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
            record = read_record(self.store, record_key)
        except DamagedError:
            return True
        return record is not None and any(artifact.key == key for artifact in record.artifacts.values())

    def _read(self, key: str) -> Record:
        record = read_record(self.store, key)
        if record is None:
            raise DamagedError(f"{self.store.uri}: {key} is missing; run the same command again", key)
        return record
