"""A run: its inputs, its store, and each stage that is done when its records are there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter

from actors.messages import BOUNDARY, Receipt, Stage, Unit, WorkerSpec, record_key
from actors.needs import Needs, needs
from actors.progress import progress
from actors.ring import FINISH, Listener, PassRunner, Step
from jobs import inputs
from prismaquant_ray.allocation.budget import Sizes, entry_bytes, measure
from prismaquant_ray.calibration.text import CalibrationSet, load_sequences
from prismaquant_ray.checkpoint.candidates import Candidates
from prismaquant_ray.checkpoint.reader import Checkpoint
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.sensitivity.table import CostTable, from_figures
from prismaquant_ray.storage.record import (
    Artifact,
    Record,
    new_attempt,
    read_record,
    write_record,
    write_tensors,
)
from prismaquant_ray.storage.store import Store

#: Opens the workers of a run: Ray's pool, or one that calls them in this process.
OpenPool = Callable[[WorkerSpec, int], AbstractContextManager[PassRunner]]

_LAYOUT = TypeAdapter(Layout)


class Run:
    """One configuration over one run store. Opening checks the inputs; stages run when asked for."""

    def __init__(self, config: Config, *, open_pool: OpenPool | None = None) -> None:
        """`open_pool` gives the workers; by default they are Ray actors on the configured cluster."""
        self.config = config
        self.open_pool = open_pool
        self.directory = inputs.resolve_source(config.model)
        self.source: Checkpoint = inputs.open_source(self.directory)

    @cached_property
    def store(self) -> Store:
        """The run store, created and claimed on first use; refused when another run's measurements are in it."""
        fingerprint = inputs.fingerprint(self.config, self.source)
        store = Store(self.config.store.run)
        body = {"fingerprint": fingerprint, "config": self.config.model_dump(mode="json")}
        if not store.create("run.json", json.dumps(body, indent=1).encode()):
            _refuse_mismatch(store, fingerprint)
        return store

    @property
    def _exists(self) -> bool:
        """Whether the store is there already; looking must not make one."""
        return (self.config.store.run / "run.json").is_file()

    @cached_property
    def layout(self) -> Layout:
        """From the run store when it is there, else from the headers and the model's own classes."""
        if self.is_measured:
            return _LAYOUT.validate_json(self.store.get("layout.json"))
        return self._build_layout()

    def _build_layout(self) -> Layout:
        from prismaquant_ray.models.inspect import build

        return build(self.source)[1]

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of every candidate and of everything else."""
        quantizable = {linear.weight for linear in self.layout.linears()}
        kept = [info for name, info in self.source.tensors.items() if name not in quantizable]
        tensors = sum(info.nbytes + entry_bytes(info.name) for info in kept)
        files = sum(self.source.store.size(name) or 0 for name in self.source.other_files())
        return measure(self.layout, self.config.formats, fixed_bytes=tensors + files)

    @cached_property
    def needs(self) -> Needs:
        """Memory and disk the run will take."""
        sizes = self.sizes
        largest = int(sizes.of(self.config.budget).max(axis=1).sum())
        budget = min(sizes.limit(self.config.budget), largest)
        return needs(self.layout, self.config, repository_bytes=budget + sizes.fixed)

    # Stages ---------------------------------------------------------------------------------------------------

    @property
    def units(self) -> dict[Stage, list[Unit]]:
        """What each pass visits, in order."""
        indices = list(range(len(self.layout.blocks)))
        return {Stage.FORWARD: ["entry", *indices], Stage.BACKWARD: ["exit", *reversed(indices)]}

    @cached_property
    def is_measured(self) -> bool:
        """Whether both passes are complete."""
        return self._exists and self.store.size("measured.json") is not None

    def check(self) -> None:
        """Everything that can be refused before the first expensive step."""
        from prismaquant_ray.checkpoint.writer import check_output

        self.sizes.limit(self.config.budget)
        check_output(self.config.store.output)
        if self.is_measured:
            return
        inputs.check_room(self.config, self.needs)
        _ = self.calibration
        inputs.check_weights(self.source, self.layout)

    def measure(self) -> None:
        """Run what is missing of both passes."""
        if self.is_measured:
            return
        self.check()
        self._store_calibration()
        microbatches = len(self.calibration.microbatches(self.config.calibration.microbatch))
        missing = {stage: self._missing(stage, units) for stage, units in self.units.items()}
        spec = WorkerSpec(name="", config=self.config, source=str(self.directory.absolute()))
        with self._pool(spec, min(microbatches, len(self.layout.blocks) + 1)) as pool:
            for stage, units in missing.items():
                if units:
                    with progress(stage, len(units), microbatches) as shown:
                        pool.run_pass(stage, units, microbatches, self._listener(shown))
        self._tidy()
        self.store.create("layout.json", _LAYOUT.dump_json(self.layout))
        self.store.create("measured.json", json.dumps({"peak_bytes": pool.peak_bytes}).encode())
        del self.is_measured

    def _pool(self, spec: WorkerSpec, at_most: int) -> AbstractContextManager[PassRunner]:
        if self.open_pool is not None:
            return self.open_pool(spec, at_most)
        # Ray is imported only by runs that measure.
        from actors.cluster import open_pool

        return open_pool(spec, at_most)

    def _listener(self, shown: Listener) -> Listener:
        """Progress, and boundaries deleted as soon as the backward pass has gone by them."""

        def listen(stage: Stage, unit: Unit, step: Step, receipt: Receipt) -> None:
            shown(stage, unit, step, receipt)
            if stage is Stage.BACKWARD and isinstance(unit, int) and step.microbatch == FINISH:
                self._drop_consumed(unit)

        return listen

    def _drop_consumed(self, unit: int) -> None:
        """Delete the boundaries that only `unit`'s visit of the backward pass still needed.

        Neighbours may finish in either order: a gradient goes when both its producer and its consumer are recorded.
        """
        last = len(self.layout.blocks) - 1
        self._drop_boundaries(Stage.FORWARD, "entry" if unit == 0 else unit - 1)
        above: Unit = "exit" if unit == last else unit + 1
        if self._is_done(Stage.BACKWARD, above):
            self._drop_boundaries(Stage.BACKWARD, above)
        if unit > 0 and self._is_done(Stage.BACKWARD, unit - 1):
            self._drop_boundaries(Stage.BACKWARD, unit)

    def _is_done(self, stage: Stage, unit: Unit) -> bool:
        return self.store.size(record_key(stage, unit)) is not None

    def _missing(self, stage: Stage, units: Sequence[Unit]) -> list[Unit]:
        """The visits without a record. A stopped pass may have holes: nothing waits for a visit's last step."""
        return [unit for unit in units if not self._is_done(stage, unit)]

    @cached_property
    def calibration(self) -> CalibrationSet:
        """The token sequences; InputError when the text is too short or there is no tokenizer."""
        from transformers import AutoTokenizer

        calibration = self.config.calibration
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.directory}: no tokenizer can be loaded ({str(error).splitlines()[0]})") from error
        return load_sequences(
            calibration.text,
            tokenizer,
            sequences=calibration.sequences,
            length=calibration.length,
            seed=calibration.seed,
            holdout=calibration.holdout,
        )

    def _store_calibration(self) -> None:
        if read_record(self.store, "calibration/record.json") is not None:
            return
        found = self.calibration
        tensors = {"tokens": found.tokens, "holdout": found.holdout}
        artifact = write_tensors(self.store, f"calibration/{new_attempt()}/tokens.safetensors", tensors)
        facts = {"fingerprint": found.fingerprint}
        write_record(self.store, "calibration/record.json", Record(artifacts={"tokens": artifact}, facts=facts))

    def _drop_boundaries(self, stage: Stage, unit: Unit) -> None:
        artifacts = self.record(stage, unit).artifacts
        self.store.delete(entry.key for name, entry in artifacts.items() if name.startswith(BOUNDARY))

    def _tidy(self) -> None:
        """Delete the last boundaries, and what stopped attempts left: data that no record names."""
        kept = set()
        for stage, units in self.units.items():
            for unit in units:
                kept.add(record_key(stage, unit))
                artifacts = self.record(stage, unit).artifacts
                kept |= {entry.key for name, entry in artifacts.items() if not name.startswith(BOUNDARY)}
        self.store.delete(key for stage in self.units for key in self.store.list(str(stage)) if key not in kept)

    # What is known afterwards ---------------------------------------------------------------------------------

    def record(self, stage: Stage, unit: Unit) -> Record:
        """The record of a finished visit."""
        found = read_record(self.store, record_key(stage, unit))
        if found is None:
            raise StoreError(
                f"{self.store.uri}: {record_key(stage, unit)} is missing; delete measured.json and run again"
            )
        return found

    @cached_property
    def records(self) -> dict[Stage, dict[int, Record]]:
        """Every block's record, by pass."""
        return {
            stage: {block.index: self.record(stage, block.index) for block in self.layout.blocks} for stage in Stage
        }

    @cached_property
    def table(self) -> CostTable:
        """Prices of every candidate; measures first when needed."""
        self.measure()
        figures = {stage: {i: record.facts for i, record in found.items()} for stage, found in self.records.items()}
        return from_figures(self.layout, self.config.formats, figures[Stage.FORWARD], figures[Stage.BACKWARD])

    @cached_property
    def candidates(self) -> Candidates:
        """The stored candidates."""
        artifacts: dict[tuple[int, FormatName], Artifact] = {}
        for index, record in self.records[Stage.FORWARD].items():
            for name in set(FormatName) & set(record.artifacts):
                artifacts[index, FormatName(name)] = record.artifacts[name]
        return Candidates(self.store, artifacts)


def _refuse_mismatch(store: Store, fingerprint: dict[str, Any]) -> None:
    try:
        stored = json.loads(store.get("run.json"))["fingerprint"]
    except (ValueError, KeyError) as error:
        raise StoreError(f"{store.uri}: run.json cannot be read; choose another store.run") from error
    for key, value in fingerprint.items():
        if stored.get(key) != value:
            shown = f"{stored.get(key)!r}, now {value!r}" if len(repr(value)) < 60 else "something else"
            raise InputError(
                f"{store.uri} holds a run with another {key} ({shown}); choose another store.run or delete this one"
            )
