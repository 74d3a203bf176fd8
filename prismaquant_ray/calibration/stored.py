"""The tokens that workers run a model on, as the driver leaves them in the store before it starts any."""

from __future__ import annotations

from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.errors import DamagedError
from prismaquant_ray.storage.record import Record, new_attempt, read_record, read_tensors, write_record, write_tensors
from prismaquant_ray.storage.store import Store

#: What is below this is the tokens.
PLACE = "calibration/"
_KEY = f"{PLACE}record.json"


def store_calibration(store: Store, found: CalibrationSet) -> None:
    """Leave a calibration set in the store, unless it is there already."""
    try:
        if read_calibration(store).fingerprint == found.fingerprint:
            return
    except DamagedError:
        store.delete([_KEY])
    artifact = write_tensors(store, f"{PLACE}{new_attempt()}/tokens.safetensors", found.state())
    metrics = {"fingerprint": found.fingerprint}
    write_record(store, _KEY, Record(artifacts={"tokens": artifact}, metrics=metrics))


def read_calibration(store: Store) -> CalibrationSet:
    """The stored calibration set; DamagedError when there is none."""
    record = read_record(store, _KEY)
    if record is None:
        raise DamagedError(f"{store.uri}: no calibration set is stored; run the same command again", _KEY)
    return CalibrationSet.of_state(read_tensors(store, record.artifacts["tokens"]))
