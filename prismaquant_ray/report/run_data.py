"""The input of `gather`: a measured run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.backward.cost_table import CostTable
from prismaquant_ray.block_records import BackwardRecord, ForwardRecord
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.config import Config
from prismaquant_ray.events import Event
from prismaquant_ray.layout import Layout
from prismaquant_ray.records import Settings
from prismaquant_ray.source.protocol import TensorSource


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunData:
    """A measured run without its plans.

    `fingerprint` is that of run.json, `peak_bytes` the peak memory of a worker, `device` the kind of device that the
    run began on. `forward` and `backward` are by block index.
    """

    uri: str
    config: Config
    source: TensorSource
    layout: Layout
    sizes: Sizes
    table: CostTable
    forward: Mapping[int, ForwardRecord]
    backward: Mapping[int, BackwardRecord]
    events: Sequence[Event]
    fingerprint: Settings
    calibration: CalibrationSet
    peak_bytes: int
    device: str | None
