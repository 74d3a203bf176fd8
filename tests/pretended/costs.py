"""What a worker's calls cost on the pretended device, whose guard must have been loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.nn.attention import SDPBackend, sdpa_kernel

from actors.schedule.units import Shard
from tests import inprocess
from tests.pretended.device import LEDGER, pretended_cuda
from tests.pretended.job import DeviceWorker
from tests.runs import configuration, full_configuration, measured
from tests.tiny import ARCHITECTURES, make_checkpoint
from tests.tiny_families import VISION_FAMILIES, make_family

#: By pass, kind of unit and call: the most launches of one call, and the most waits with their places.
Costs = dict[str, dict[str, Any]]


def costs_of(name: str, directory: Path, *settings: str) -> Costs:
    """Of every call of a measurement, but for the first microbatch of a shard, which loads it."""
    make = make_checkpoint if name in ARCHITECTURES else make_family
    configured = full_configuration if name in VISION_FAMILIES else configuration
    config = configured(directory / "run", make(directory / "source", name), "calibration.microbatch=2", *settings)
    found: Costs = {}

    class Counted(DeviceWorker):
        """Its calls, one by one."""

        def run(self, shard: Shard, microbatch: int, arriving: Any) -> Any:
            loaded = self.task is not None and self.task.shard == shard
            LEDGER.clear()
            answer = super().run(shard, microbatch, arriving)
            if loaded:
                _note(found, f"{shard.stage} {_kind(shard)} microbatch")
            return answer

        def finish(self, shard: Shard, following: Shard | None = None) -> Any:
            LEDGER.clear()
            answer = super().finish(shard, following)
            _note(found, f"{shard.stage} {_kind(shard)} finish")
            return answer

    with sdpa_kernel(SDPBackend.MATH), pretended_cuda(), patch.object(inprocess, "ShardWorker", Counted):
        measured(config)
    return found


def _kind(shard: Shard) -> str:
    first = shard.units[0]
    return "block" if isinstance(first, int) else "exit" if not isinstance(first, str) else first


def _note(found: Costs, call: str) -> None:
    waits, launches = sum(LEDGER.waits.values()), sum(LEDGER.launches.values())
    entry = found.setdefault(call, {"launches": 0, "waits": -1, "places": []})
    entry["launches"] = max(entry["launches"], launches)
    if waits > entry["waits"]:
        entry["waits"] = waits
        entry["places"] = [f"{count} {kind}: {place}" for (kind, place), count in LEDGER.waits.most_common()]
