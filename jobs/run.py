"""A run: its inputs, its store, and each stage that is done when its records are there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import click
from pydantic import TypeAdapter, ValidationError

from actors.events import EventLog, Events
from actors.memory_plan import MemoryPlan, memory_plan
from actors.messages import WorkerSpec
from actors.progress import progress
from actors.schedule.pass_graph import PassGraph
from actors.schedule.run_store import RunStore
from actors.schedule.units import PASSES, Stage
from jobs import inputs
from jobs.measure import REPAIRS, Measurement, OpenWorkers, ray_crew
from prismaquant_ray.allocation.budget import Sizes, entry_bytes, measure
from prismaquant_ray.allocation.constraints import constrained
from prismaquant_ray.allocation.kv_cache import Serving, draft_layers, kv_cache
from prismaquant_ray.backward.cost_table import CostTable, from_figures
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.stored import PLACE as CALIBRATION
from prismaquant_ray.calibration.stored import store_calibration
from prismaquant_ray.config import Config
from prismaquant_ray.errors import DamagedError, InputError, StoreError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.forward.candidates import Candidates
from prismaquant_ray.layout import Layout
from prismaquant_ray.repository.staging import check_output
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.storage.connection import absolute
from prismaquant_ray.storage.lease import LEASES, TTL, Holder, Lease, held
from prismaquant_ray.storage.record import Artifact, Record
from prismaquant_ray.storage.store import Store

_LAYOUT = TypeAdapter(Layout)
# What a measured run answers from memory, and a repaired one must read again.
_MEASURED = ("is_measured", "layout", "records", "table", "candidates")
T = TypeVar("T")


class Run:
    """One configuration over one run store. Opening checks the inputs; stages run when asked for."""

    def __init__(
        self, config: Config, *, open_workers: OpenWorkers = ray_crew, fresh: bool = False, weights: bool = True
    ) -> None:
        """`open_workers` gives the workers; `fresh` deletes what the run store holds before anything is measured.

        Without `weights` the model may be a configuration only, and nothing but its layout and needs can be asked for.
        """
        self.config = config
        self.open_workers = open_workers
        self.fresh = fresh
        self.lease: Lease | None = None
        self.peak_bytes = 0
        self.source: TensorSource = inputs.open_source(config.model, weights=weights)

    @cached_property
    def store(self) -> Store:
        """The run store, created and claimed on first use; refused when another run's measurements are in it."""
        fingerprint = inputs.fingerprint(self.config, self.source)
        store = Store(self.config.store.run)
        body = {"fingerprint": fingerprint, "config": self.config.model_dump(mode="json")}
        if not store.create("run.json", json.dumps(body, indent=1).encode()):
            inputs.refuse_mismatch(store, fingerprint)
        return store

    @cached_property
    def run_store(self) -> RunStore:
        """The records of both passes."""
        return RunStore(self.store)

    @property
    def _exists(self) -> bool:
        """Whether the store is there already; looking must not make one."""
        return inputs.exists(self.config.store.run, "run.json")

    @cached_property
    def layout(self) -> Layout:
        """From the run store when it is there, else from the headers and the model's own classes."""
        if self.is_measured:
            try:
                return _LAYOUT.validate_json(self.store.get("layout.json"))
            except (KeyError, ValidationError):
                self.store.put("layout.json", _LAYOUT.dump_json(self._build_layout()))
        return self._build_layout()

    def _build_layout(self) -> Layout:
        from prismaquant_ray.model.layout_builder import build_layout, scope_of

        return build_layout(self.source, scope_of(self.config))[1]

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of every candidate and of everything else, with what the configuration rules out."""
        quantizable = {source for linear in self.layout.linears() for source in linear.sources}
        kept = [info for name, info in self.source.tensors.items() if name not in quantizable]
        files = sum(self.source.store.size(name) or 0 for name in self.source.other_files())
        sizes = measure(
            self.layout,
            self.config.formats,
            ignored_bytes=sum(info.nbytes for info in kept),
            other_bytes=sum(entry_bytes(info.name) for info in kept) + files,
            serving=self._serving,
        )
        return constrained(sizes, self.layout, self.config.allocation)

    @property
    def _serving(self) -> Serving | None:
        """What a server holds beside the weights, when the budget says for how long a context."""
        from prismaquant_ray.model.layout_builder import load_config

        budget = self.config.budget
        if budget.context is None:
            return None
        text = load_config(self.source).get_text_config()
        drafts = draft_layers(text, self.source.tensors)
        return Serving(
            cache=kv_cache(text, kv_cache=budget.kv_cache, draft_layers=drafts),
            context=budget.context,
            sequences=budget.sequences,
            margin=budget.margin,
        )

    @cached_property
    def memory_plan(self) -> MemoryPlan:
        """Memory and disk the run will take."""
        sizes = self.sizes
        largest = int(sizes.of(self.config.budget).max(axis=1).sum())
        budget = min(sizes.limit(self.config.budget), largest)
        return memory_plan(self.layout, self.config, repository_bytes=budget + sizes.fixed)

    @cached_property
    def calibration(self) -> CalibrationSet:
        """Texts and images; InputError when the text is too short, or what prepares them is not there."""
        calibration = self.config.calibration
        if calibration.images is not None and self.layout.image_token is None:
            raise InputError(
                f"calibration.images is given, but {self.layout.architecture} has no vision tower that is known "
                "here; remove it"
            )
        return inputs.load_tokens(
            self.source,
            self.layout,
            calibration.text,
            calibration.images,
            sequences=calibration.sequences,
            length=calibration.length,
            seed=calibration.seed,
            holdout=calibration.holdout,
        )

    @cached_property
    def graph(self) -> PassGraph:
        """The units of both passes."""
        images = len(self.calibration.images)
        texts = math.ceil(self.calibration.texts / self.config.calibration.microbatch)
        return PassGraph.of(self.layout, texts=texts, images=images)

    # Stages ---------------------------------------------------------------------------------------------------

    @cached_property
    def is_measured(self) -> bool:
        """Whether both passes are complete."""
        return not self.fresh and self._exists and self.store.size("measured.json") is not None

    def check(self) -> None:
        """Everything that can be refused before the first expensive step."""
        inputs.check_stores(self.config)
        self.sizes.limit(self.config.budget)
        check_output(self.config.store.output)
        if self.is_measured:
            return
        inputs.check_room(self.config, self.memory_plan)
        _ = self.calibration
        if self.source.store.path is not None:
            # Elsewhere reading everything here would cost what the workers are for; they check what they load.
            inputs.check_weights(self.source, self.layout)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """No other driver works on the run store inside the with-block; ResourceError when one does already."""
        if self.lease is not None:
            yield
            return
        store = Store(self.config.store.run)
        with held(store, notice=_waiting) as lease:
            self.lease = lease
            try:
                if self.fresh and self._exists:
                    inputs.empty(store, keep=LEASES)
                self.fresh = False
                _ = self.store
                yield
            finally:
                self.lease = None

    def measure(self) -> None:
        """Run what is missing of both passes."""
        if self.is_measured:
            return
        self.check()
        with self.claimed(), self.logged() as (events, log):
            store_calibration(self.store, self.calibration)
            spec = WorkerSpec(
                name="",
                config=self.config,
                source=inputs.absolute_source(self.config.model),
                run=absolute(self.config.store.run),
            )
            assert self.lease is not None
            passes = Measurement(
                spec=spec,
                memory_plan=self.memory_plan,
                graph=self.graph,
                run_store=self.run_store,
                events=events,
                check=self.lease.check,
            )
            passes.run(self.open_workers)
            self.run_store.tidy()
            self.store.create("layout.json", _LAYOUT.dump_json(self.layout))
            log.flush()
            self.store.create("measured.json", json.dumps({"peak_bytes": log.peak_bytes}).encode())
        self._read_again()

    @contextmanager
    def logged(self) -> Iterator[tuple[Events, EventLog]]:
        """Events inside the with-block are shown, and kept in the run store."""
        log = EventLog(self.store)
        with progress() as shown:
            events = Events(log, shown)
            events("begin", workers=self.config.cluster.workers)
            ended = "stopped"
            try:
                yield events, log
                ended = "measured"
            finally:
                events("end", how=ended)
                log.flush()

    def note(self, kind: str, **payload: Any) -> None:
        """Add an event to the run's log."""
        log = EventLog(self.store)
        Events(log)(kind, **payload)
        log.flush()

    def stored(self, key: str, made_by: str) -> dict[str, Any] | None:
        """A JSON object of the run store, None when there is none; StoreError, saying what makes it, when damaged."""
        try:
            body: dict[str, Any] = json.loads(self.store.get(key))
        except KeyError:
            return None
        except ValueError as error:
            raise StoreError(f"{self.store.uri}: {key} cannot be read; run {made_by} again") from error
        return body

    def repairing(self, action: Callable[[], T]) -> T:
        """What `action` returns; a stored object that it finds damaged is made again first."""
        for _ in range(REPAIRS):
            try:
                return action()
            except DamagedError as error:
                with self.claimed():
                    if error.key.startswith(CALIBRATION):
                        store_calibration(self.store, self.calibration)
                        self.note("repair", key=error.key, message=str(error), forgotten=[])
                        continue
                    forgotten = self.run_store.forget(error.key)
                    if not forgotten:
                        raise
                    click.echo(f"damaged: {error.key}; it is made again", err=True)
                    self.note("repair", key=error.key, message=str(error), forgotten=forgotten)
                    self.store.delete(["measured.json"])
                    self._read_again()
                    self.measure()
        return action()

    def _read_again(self) -> None:
        for name in _MEASURED:
            self.__dict__.pop(name, None)

    # What is known afterwards ---------------------------------------------------------------------------------

    @cached_property
    def records(self) -> dict[Stage, dict[int, Record]]:
        """Every block's record, by pass."""
        indices = [block.index for block in self.layout.blocks]
        found = {stage: self.run_store.records(stage, indices) for stage in PASSES}
        return {stage: {index: records[index] for index in indices} for stage, records in found.items()}

    @cached_property
    def table(self) -> CostTable:
        """Prices of every candidate; measures first when needed."""
        self.measure()
        figures = {stage: {i: record.metrics for i, record in found.items()} for stage, found in self.records.items()}
        return from_figures(
            self.layout,
            self.config.formats,
            figures[Stage.FORWARD],
            figures[Stage.BACKWARD],
            draft_weight=self.config.allocation.mtp_weight,
        )

    @cached_property
    def candidates(self) -> Candidates:
        """The stored candidates."""
        artifacts: dict[tuple[int, FormatName], Artifact] = {}
        for index, record in self.records[Stage.FORWARD].items():
            for name in set(FormatName) & set(record.artifacts):
                artifacts[index, FormatName(name)] = record.artifacts[name]
        return Candidates(self.store, artifacts)


def _waiting(holder: Holder) -> None:
    who = f"process {holder.pid} on {holder.host}"
    click.echo(f"{who} holds this run; it is taken over unless that says something within {TTL:.0f} s", err=True)
