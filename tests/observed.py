"""Runs that something happens to: their configuration, what they left in their store, and whether it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.schedule.run_store import RunStore
from actors.schedule.units import PASSES
from prismaquant_ray.event_log import steps_by_shard
from prismaquant_ray.events import ShardSteps, read_events
from prismaquant_ray.serialization import to_json
from prismaquant_ray.storage.store import Store

#: pytest's `record_property`: a title and a line under it at the end of the test run.
Record = Callable[[str, object], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Of a model without drafts and its calibration data."""

    layers: int
    sequences: int
    length: int
    microbatch: int
    blocks_per_shard: int

    @property
    def microbatches(self) -> int:
        return self.sequences // self.microbatch

    @property
    def steps(self) -> int:
        """Of an undisturbed run.

        The entry and a pass's shards take every microbatch and one more step; an exit takes one and one more.
        """
        shards = 1 + self.layers // self.blocks_per_shard * 2
        return shards * (self.microbatches + 1) + 2 * self.microbatches


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenery:
    """What the runs of a module share; `bucket` is a URI."""

    bucket: str
    size: Size
    source: str
    text: Path


class ObservedRun:
    """One run, in a store of its own."""

    def __init__(self, scenery: Scenery, directory: Path, name: str, record: Record = lambda *_: None) -> None:
        self.scenery = scenery
        self.size = size = scenery.size
        self.record = record
        self.name = name
        self.run_uri, self.output = f"{scenery.bucket}/{name}/run", f"{scenery.bucket}/{name}/repository"
        self.config = directory / "config.yaml"
        self.config.write_text(
            f"""
model: {{source: {scenery.source}}}
calibration:
  text: {scenery.text}
  sequences: {size.sequences}
  length: {size.length}
  microbatch: {size.microbatch}
  holdout: 0.25
budget: {{bpp: 6.0}}
cluster: {{workers: auto, device: cpu, blocks_per_shard: {size.blocks_per_shard}}}
store: {{run: {self.run_uri}, output: {self.output}}}
"""
        )

    @property
    def store(self) -> Store:
        """The run store as this process reaches it, which is not disturbed."""
        return Store(self.run_uri)

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = [to_json(event) for event in read_events(self.store) if event.event == kind]
        return [{key: value for key, value in body.items() if key not in ("at", "event")} for body in found]

    def records(self) -> dict[str, bytes]:
        return {key: self.store.get(key) for key in self.store.list() if key.endswith("/record.json")}

    def orphans(self) -> int:
        """Microbatches whose boundary was written by an attempt that left no record."""
        run_store, kept = RunStore(self.store), set()
        for stage in PASSES:
            for unit in run_store.recorded(stage).boundaries:
                kept |= {artifact.key for artifact in run_store.boundary(stage, unit).values()}
        return sum("/boundary-" in key and key not in kept for key in self.store.list())

    def work(self) -> list[ShardSteps]:
        return steps_by_shard(read_events(self.store))

    def steps(self) -> int:
        return sum(work.steps for work in self.work())

    def repeated(self) -> int:
        return self.steps() - self.size.steps

    def is_same(self, expected: Mapping[str, str], repeated: int, at_most: int, harmed: Sequence[str] = ()) -> None:
        """The same bytes as undisturbed, nothing more repeated than allowed, nothing damaged unless a test did it."""
        assert stored_digests(self.output) == expected
        assert [repair["key"] for repair in self.events("repair")] == list(harmed)
        allowed = f"{repeated:>3} of {self.size.steps} steps repeated, at most {at_most} allowed"
        self.record("faults", f"{self.name:<44} {self.figures()}{allowed}")
        assert repeated <= at_most

    def figures(self) -> str:
        """What else is recorded of it."""
        return ""


def stored_digests(uri: str) -> dict[str, str]:
    """SHA-256 of every object below a URI."""
    store = Store(uri)
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key in store.list()}
