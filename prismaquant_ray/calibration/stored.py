"""The tokens that workers run a model on, as the driver leaves them in the store before it starts any."""

from __future__ import annotations

from dataclasses import replace

from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.errors import DamagedError
from prismaquant_ray.records import CALIBRATION, CALIBRATION_RECORD, CalibrationRecord
from prismaquant_ray.serialization import from_json, to_json
from prismaquant_ray.storage.record import Record, new_attempt, read_record, read_tensors, write_record, write_tensors
from prismaquant_ray.storage.store import Store


def store_calibration(store: Store, found: CalibrationSet, *, run: str) -> None:
    """Leave the calibration set of a run in its store, unless it is there already."""
    try:
        if read_calibration(store, run=run).fingerprint == found.fingerprint:
            return
    except DamagedError:
        store.delete([CALIBRATION_RECORD])
    artifact = write_tensors(store, f"{CALIBRATION}{new_attempt()}/tokens.safetensors", found.state())
    metrics = to_json(CalibrationRecord(fingerprint=found.fingerprint, sources=found.sources))
    write_record(store, CALIBRATION_RECORD, Record(artifacts={"tokens": artifact}, metrics=metrics), run=run)


def read_calibration(store: Store, *, run: str) -> CalibrationSet:
    """The stored calibration set of a run; DamagedError when there is none."""
    record = read_record(store, CALIBRATION_RECORD, run=run)
    if record is None:
        raise DamagedError(f"{store.uri}: no calibration set is stored; run the same command again", CALIBRATION_RECORD)
    found = CalibrationSet.of_state(read_tensors(store, record.artifacts["tokens"]))
    try:
        sources = from_json(CalibrationRecord, record.metrics).sources
    except ValueError as error:
        raise DamagedError(
            f"{store.uri}: {CALIBRATION_RECORD} is no record of a set ({error})", CALIBRATION_RECORD
        ) from error
    return replace(found, sources=sources)
