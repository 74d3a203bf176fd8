"""A measured run: records, prices, plans and candidates, each read on first use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from actors.schedule.run_store import RunStore
from actors.schedule.units import PASSES, Stage
from actors.stored_blocks import StoredBlocks
from prismaquant_ray import records
from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.allocation.plans import Planner
from prismaquant_ray.backward.cost_table import cost_table
from prismaquant_ray.block_records import BackwardRecord, ForwardRecord
from prismaquant_ray.cache_rounding import CacheScale, scales_of
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.stored import read_calibration
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.events import read_events
from prismaquant_ray.formats import FormatName
from prismaquant_ray.forward.candidates import Candidates
from prismaquant_ray.layout import Layout
from prismaquant_ray.parsing import MAX_BYTES
from prismaquant_ray.records import DeviceRecord, MeasuredPlans, PlanRecord, RunRecord, SweepRecord
from prismaquant_ray.report.findings import Findings
from prismaquant_ray.report.gather import gather
from prismaquant_ray.report.run_data import RunData
from prismaquant_ray.serialization import from_bytes, to_bytes
from prismaquant_ray.source.folded import FoldedSource
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.storage.record import Record
from prismaquant_ray.storage.store import Store

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A run whose passes are complete. Damaged objects raise DamagedError, see `Run.repairing`."""

    config: Config
    source: TensorSource
    layout: Layout
    sizes: Sizes
    run_store: RunStore

    @property
    def store(self) -> Store:
        """The run store."""
        return self.run_store.store

    @cached_property
    def _records(self) -> Mapping[Stage, Mapping[int, Record]]:
        indices = [block.index for block in self.layout.blocks]
        found = {stage: self.run_store.records(stage, indices) for stage in PASSES}
        return {stage: {index: each[index] for index in indices} for stage, each in found.items()}

    @cached_property
    def forward(self) -> Mapping[int, ForwardRecord]:
        """Records of the forward pass, by block index."""
        return self.run_store.typed(ForwardRecord, Stage.FORWARD, self._records[Stage.FORWARD])

    @cached_property
    def backward(self) -> Mapping[int, BackwardRecord]:
        """Records of the backward pass, by block index."""
        return self.run_store.typed(BackwardRecord, Stage.BACKWARD, self._records[Stage.BACKWARD])

    @cached_property
    def planner(self) -> Planner:
        """Prices and plans."""
        table = cost_table(
            self.layout,
            self.config.formats,
            self.forward,
            self.backward,
            draft_weight=self.config.allocation.mtp_weight,
        )
        return Planner(config=self.config, layout=self.layout, sizes=self.sizes, table=table)

    @cached_property
    def candidates(self) -> Candidates:
        """The stored candidates."""
        artifacts = {
            (index, FormatName(name)): artifact
            for index, record in self._records[Stage.FORWARD].items()
            for name, artifact in record.artifacts.items()
            if name != records.FACTORS
        }
        return Candidates(self.store, artifacts)

    def shipped(self, choice: Mapping[str, FormatName]) -> TensorSource:
        """The source with the factors that a plan's candidates were made with."""
        stored = StoredBlocks(self.run_store)
        return FoldedSource(
            self.source,
            [
                (block, [(fold, s) for fold, s in stored.equalization(block.index) if fold.is_used(block, choice)])
                for block in self.layout.blocks
                if self.forward[block.index].folds
            ],
        )

    def cache_scales(self, choice: Mapping[str, FormatName]) -> dict[str, CacheScale]:
        """The scales of an FP8 KV cache in the repository of a choice, by attention.

        Raises:
            InputError: the cache of the model stays in 16 bits, or the run has no price of it.
        """
        self.planner.cache_cost("fp8")
        found: dict[str, CacheScale] = {}
        for block in self.layout.blocks:
            record = self.forward[block.index]
            found |= scales_of(block, record.cache, record.folds, choice)
        return found

    @cached_property
    def calibration(self) -> CalibrationSet:
        """The tokens that the run was measured on."""
        return read_calibration(self.store, run=self.run_store.run)

    @cached_property
    def sweep(self) -> SweepRecord:
        """The plans of the configured sweep; also stored."""
        found = self.planner.sweep
        self.store.put(records.SWEEP, to_bytes(found))
        return found

    @cached_property
    def plan(self) -> PlanRecord:
        """The plan of the configured budget; also stored."""
        found = self.planner.plan
        self.store.put(records.plan_key(found.target), to_bytes(found))
        return found

    def findings(self, plan: PlanRecord) -> Findings:
        """Everything that the run found, with `plan` as the budget's. Gathered once per plan."""
        known = self._findings.get(plan.target)
        if known is None or known[0] != plan:
            started = time.perf_counter()
            try:
                sweep = self.sweep
            except InputError:
                sweep = None  # every target is out of reach of these formats
            found = gather(
                self.data,
                self.planner,
                plan,
                sweep,
                self.measured_plans(),
                planning_seconds=time.perf_counter() - started,
            )
            known = self._findings[plan.target] = plan, found
        return known[1]

    @cached_property
    def _findings(self) -> dict[str, tuple[PlanRecord, Findings]]:
        return {}

    def measured_plans(self) -> MeasuredPlans | None:
        """Measured losses of plans; None if none were measured."""
        found = read_stored(self.store, MeasuredPlans, records.MEASURED_PLANS, made_by="sweep --measure")
        if found is not None and found.run != self.run_store.run:
            uri = self.store.uri
            raise StoreError(f"{uri}: {records.MEASURED_PLANS} is of another run; run sweep --measure again")
        return found

    @cached_property
    def data(self) -> RunData:
        """The input of `gather`."""
        run = read_stored(self.store, RunRecord, records.RUN, made_by="quantize --fresh")
        measured = self.run_store.measured
        device = read_stored(self.store, DeviceRecord, records.DEVICE, made_by="quantize --fresh")
        assert run is not None
        assert measured is not None
        return RunData(
            uri=self.store.uri,
            config=self.config,
            source=self.source,
            layout=self.layout,
            sizes=self.sizes,
            table=self.planner.table,
            forward=self.forward,
            backward=self.backward,
            events=read_events(self.store),
            fingerprint=run.fingerprint,
            calibration=self.calibration,
            peak_bytes=measured.peak_bytes,
            device=None if device is None else device.device,
        )


def read_stored(store: Store, kind: type[T], key: str, made_by: str) -> T | None:
    """A record of a run store, None when there is none.

    Raises:
        StoreError: it is damaged; the message names the command `made_by` that makes it.
    """
    try:
        return from_bytes(kind, store.get(key, MAX_BYTES))
    except KeyError:
        return None
    except ValueError as error:
        raise StoreError(f"{store.uri}: {key} cannot be read; run {made_by} again") from error
