"""A run: its inputs, its store, and both passes, which are done when all records are stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

from pydantic import TypeAdapter

from actors.memory_plan import MemoryPlan, memory_plan
from actors.schedule.pass_graph import PassGraph
from actors.schedule.run_store import RunStore
from jobs.pipeline import checks, sources
from jobs.pipeline.measured import Measured
from jobs.pipeline.passes import REPAIRS, Measurement
from jobs.pipeline.workers import OpenWorkers, ray_workers
from prismaquant_ray import records
from prismaquant_ray.allocation.budget import Sizes, entry_bytes, measure
from prismaquant_ray.allocation.constraints import check_limits, constrained
from prismaquant_ray.allocation.kv_cache import Serving, check_rounded, draft_layers, kv_cache
from prismaquant_ray.allocation.speed import Times
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.reading import GivenText, TextReader
from prismaquant_ray.calibration.stored import store_calibration
from prismaquant_ray.config import Config
from prismaquant_ray.errors import DamagedError, InputError
from prismaquant_ray.event_log import EventLog
from prismaquant_ray.events import Event, Events, Listener, Notice, ObjectRepaired, RunBegan, RunEnded
from prismaquant_ray.formats import FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.layout_builder import build_layout, scope_of, transformers_config
from prismaquant_ray.records import MeasuredRecord, RunRecord
from prismaquant_ray.repository.staging import check_output
from prismaquant_ray.serialization import to_bytes
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.storage.lease import LEASES, TTL, Holder, Lease, held
from prismaquant_ray.storage.store import Store

T = TypeVar("T")


class Run:
    """One configuration over one run store. Opening checks the inputs; stages run on demand."""

    def __init__(
        self,
        config: Config,
        *,
        on_event: Listener | None = None,
        open_workers: OpenWorkers = ray_workers,
        fresh: bool = False,
        weights: bool = True,
        text: GivenText | None = None,
        evaluation_text: GivenText | None = None,
    ) -> None:
        """`open_workers` opens the workers; `fresh` empties the run store before measuring.

        `text` and `evaluation_text` are rows in place of the configured sources. Without `weights` the model may be a
        configuration only; then only layout and memory plan are available.
        """
        self.listeners = () if on_event is None else (on_event,)
        self.open_workers = open_workers
        self.fresh = fresh
        self.reader = TextReader(calibration=text, evaluation=evaluation_text)
        self.config = self._decided(checks.with_rows(config, text, evaluation_text))
        self.lease: Lease | None = None
        say = self.say if self.listeners else None
        self.source: TensorSource = sources.open_source(config.model, weights=weights, say=say)
        self._measured: Measured | None = None

    def _decided(self, config: Config) -> Config:
        """The configuration with its dtype, and with the formats that its limits add."""
        config = checks.with_dtype(config)
        stored = None
        limited = config.allocation.limits.given and config.paired_formats != config.formats
        if limited and not self.fresh and checks.exists(config.store.run, records.RUN):
            stored = checks.stored_fingerprint(Store(config.store.run))
        config, lacking = checks.with_formats(config, stored)
        if lacking is not None:
            self.say(lacking)
        return config

    # Inputs -----------------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> Store:
        """The run store, created on first use; raises InputError if it holds another run."""
        fingerprint = checks.fingerprint(self.config, self.source, self.reader)
        store = Store(self.config.store.run)
        record = RunRecord(fingerprint=fingerprint, config=self.config.model_dump(mode="json"))
        if not store.create(records.RUN, to_bytes(record)):
            checks.refuse_mismatch(store, fingerprint, self.config.paired_formats)
        return store

    @cached_property
    def run_store(self) -> RunStore:
        """The records of both passes."""
        return RunStore(self.store)

    @cached_property
    def layout(self) -> Layout:
        """The layout, from the run store if it is there, else from headers and the model's own classes."""
        if self.is_measured:
            stored = self.run_store.layout
            return self._store_layout(self._build_layout()) if stored is None else stored
        return self._build_layout()

    def _store_layout(self, layout: Layout) -> Layout:
        self.run_store.write_layout(layout)
        return layout

    def _build_layout(self) -> Layout:
        return build_layout(self.source, scope_of(self.config))[1]

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of every candidate and of everything else, with the configured constraints and a cache in 16 bits."""
        quantizable = {source for linear in self.layout.linears() for source in linear.sources}
        ignored = [info for name, info in self.source.tensors.items() if name not in quantizable]
        files = sum(self.source.store.size(name) or 0 for name in self.source.other_files())
        sizes = measure(
            self.layout,
            self.config.formats,
            ignored_bytes=sum(info.nbytes for info in ignored),
            other_bytes=sum(entry_bytes(info.name) for info in ignored) + files,
            serving=self._serving(),
        )
        return constrained(sizes, self.layout, self.config.allocation)

    @cached_property
    def times(self) -> Times:
        """Time of every candidate on the configured card."""
        return Times.of(self.layout, self.config.formats, self.sizes.weights, self.config.allocation.limits.gpu)

    def check_budget(self) -> int:
        """Bytes of candidates that the budget allows; raises InputError where no plan keeps it, or the limits in it."""
        sizes = self.roomiest
        limit = sizes.limit(self.config.budget)
        check_limits(sizes, self.times, self.config.budget, self.config.allocation.limits)
        return limit

    @property
    def _text(self) -> tuple[Any, int]:
        """The text part of the model's configuration, and how many draft layers there are."""
        text = transformers_config(self.source).get_text_config()
        return text, draft_layers(text, self.source.tensors)

    @cached_property
    def roomiest(self) -> Sizes:
        """Sizes with the KV cache that leaves most room for weights, of those that may be chosen.

        Raises:
            InputError: the model's cache cannot be rounded.
        """
        if self.config.kv_cache == "bf16":
            return self.sizes
        check_rounded(self.layout, *self._text)
        return self.sizes.in_fp8()

    def _serving(self) -> Serving | None:
        """A server's memory beside the weights, if the budget has a context."""
        budget = self.config.budget
        if budget.context is None:
            return None
        text, drafts = self._text
        return Serving(
            cache=kv_cache(text, kv_cache="bf16", draft_layers=drafts),
            context=budget.context,
            sequences=budget.sequences,
            margin=budget.margin,
        )

    @cached_property
    def memory_plan(self) -> MemoryPlan:
        """Memory and disk that the run needs."""
        sizes = self.roomiest
        largest = int(sizes.of(self.config.budget).max(axis=1).sum())
        budget = min(sizes.limit(self.config.budget), largest)
        return memory_plan(self.layout, self.config, repository_bytes=budget + sizes.fixed)

    @cached_property
    def calibration(self) -> CalibrationSet:
        """Texts and images.

        Raises:
            InputError: the text is too short, or tokenizer or processor are missing.
        """
        calibration = self.config.calibration
        if calibration.images is not None and self.layout.image_token is None:
            raise InputError(
                f"calibration.images is given, but {self.layout.architecture} has no vision tower that is known "
                "here; remove it"
            )
        return sources.load_tokens(
            self.source, self.layout, calibration, self.reader, seed=calibration.seed, holdout=calibration.holdout
        )

    @cached_property
    def graph(self) -> PassGraph:
        """The units of both passes."""
        images = len(self.calibration.images)
        texts = math.ceil(self.calibration.texts / self.config.calibration.microbatch)
        return PassGraph.of(self.layout, texts=texts, images=images)

    def check(self) -> None:
        """All checks before the first expensive step; raises InputError or StoreError."""
        checks.check_stores(self.config)
        self.check_budget()
        check_output(self.config.store.output)
        if self.is_measured:
            return
        checks.check_output_config(self.source, self.layout, self.config.formats)
        checks.check_room(self.config, self.memory_plan)
        _ = self.calibration
        checks.check_tied(self.source, self.layout)
        if self.source.store.path is not None:
            # Not for object stores: workers check the tensors they load.
            checks.check_weights(self.source, self.layout)

    # Measuring --------------------------------------------------------------------------------------------------

    @property
    def _exists(self) -> bool:
        """Whether the store exists; does not create it."""
        return checks.exists(self.config.store.run, records.RUN)

    @cached_property
    def is_measured(self) -> bool:
        """Whether both passes are complete."""
        return not self.fresh and self._exists and self.run_store.measured is not None

    @contextmanager
    def claimed(self) -> Iterator[Lease]:
        """Hold the lease of the run store inside the with-block; raises ResourceError if another driver holds it."""
        if self.lease is not None:
            yield self.lease
            return
        store = Store(self.config.store.run)
        with held(store, notice=self._waiting) as lease:
            self.lease = lease
            try:
                if self.fresh and self._exists:
                    checks.empty(store, keep=LEASES)
                self.fresh = False
                _ = self.store
                yield lease
            finally:
                self.lease = None

    def _waiting(self, holder: Holder) -> None:
        who = f"process {holder.pid} on {holder.host}"
        self.say(f"{who} holds this run; it is taken over unless that says something within {TTL:.0f} s")

    def measure(self) -> None:
        """Run the missing parts of both passes."""
        if self.is_measured:
            return
        self.check()
        with self.claimed() as lease, self.logged() as (events, log):
            store_calibration(self.store, self.calibration, run=self.run_store.run)
            events(sources.texts_read("calibration", self.calibration))
            spec = sources.worker_spec(self._as_stored(), self.source, self.config.store.run)
            passes = Measurement(
                spec=spec,
                memory_plan=self.memory_plan,
                graph=self.graph,
                run_store=self.run_store,
                events=events,
                check=lease.check,
            )
            passes.run(self.open_workers)
            self.run_store.tidy()
            self.run_store.write_layout(self.layout)
            log.flush()
            self.store.put(records.MEASURED, to_bytes(MeasuredRecord(peak_bytes=log.peak_bytes)))
        self.is_measured = True

    def _as_stored(self) -> Config:
        """The configuration with all formats of the stored run: what is made again of it has those, too."""
        stored = checks.stored_fingerprint(self.store)["formats"]
        return self.config.model_copy(update={"formats": TypeAdapter(tuple[FormatName, ...]).validate_python(stored)})

    def measured(self) -> Measured:
        """The measured run; runs the missing parts of both passes first."""
        if self._measured is None:
            self.measure()
            self._measured = Measured(
                config=self.config,
                source=self.source,
                layout=self.layout,
                sizes=self.sizes,
                run_store=self.run_store,
            )
        return self._measured

    def repairing(self, action: Callable[[Measured], T]) -> T:
        """The result of `action` on the measured run; damaged objects that it finds are made again."""
        for _ in range(REPAIRS):
            try:
                return action(self.measured())
            except DamagedError as error:
                self._repair(error)
        return action(self.measured())

    def _repair(self, error: DamagedError) -> None:
        with self.claimed():
            self._measured = None
            if error.key.startswith(records.CALIBRATION):
                store_calibration(self.store, self.calibration, run=self.run_store.run)
                forgotten: list[str] = []
            else:
                forgotten = self.run_store.forget(error.key)
                if not forgotten:
                    raise error
                self.store.delete([records.MEASURED])
                self.is_measured = False
            self.note(ObjectRepaired(key=error.key, message=str(error), forgotten=forgotten))

    # Events -----------------------------------------------------------------------------------------------------

    @contextmanager
    def logged(self) -> Iterator[tuple[Events, EventLog]]:
        """Inside the with-block, events go to the listeners and to the log in the run store."""
        log = EventLog(self.store)
        events = Events(log, *self.listeners)
        events(RunBegan(workers=self.config.cluster.workers))
        ended = "stopped"
        try:
            yield events, log
            ended = "measured"
        finally:
            events(RunEnded(how=ended))
            log.flush()

    def say(self, message: str) -> None:
        """Tell the listeners something that is not kept."""
        Events(*self.listeners)(Notice(message=message))

    def note(self, event: Event) -> None:
        """Send one event to the listeners and to the run's log."""
        log = EventLog(self.store)
        Events(log, *self.listeners)(event)
        log.flush()
