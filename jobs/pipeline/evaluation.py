"""Measuring variants of a model against the source on text; results are cached in the run store.

The store holds `evaluations/<digest>/`, one record per variant and text, with figures per token. A running evaluation
has its own store below `evaluations/running/`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from actors.memory_plan import evaluation_memory_plan
from actors.messages import Evaluation
from actors.schedule.pass_graph import PassGraph
from actors.schedule.run_store import RunStore
from actors.schedule.shards import droppable_evaluation_boundaries, pending_evaluation_shards
from actors.schedule.units import Shard, Stage, Unit
from jobs.pipeline import sources
from jobs.pipeline.passes import Passes
from jobs.pipeline.workers import OpenWorkers
from prismaquant_ray import __version__, records
from prismaquant_ray.block_records import DraftRecord, RoutingRecord
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.stored import store_calibration
from prismaquant_ray.config import Config
from prismaquant_ray.errors import DamagedError, InputError
from prismaquant_ray.evaluation.divergence import TokenFigures, mean_of, summarize
from prismaquant_ray.evaluation.variants import Variant
from prismaquant_ray.events import Events
from prismaquant_ray.layout import Layout
from prismaquant_ray.records import Divergence, Excess, SourceFigures
from prismaquant_ray.serialization import from_json, to_json
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.storage.connection import absolute
from prismaquant_ray.storage.record import Record, new_attempt, read_record, read_tensors, write_record, write_tensors
from prismaquant_ray.storage.store import Store

# Bytes of hidden states of a microbatch, over all models, that one worker hands to the next.
_HOP_BYTES = 1 << 28


def source_figures(found: Divergence) -> SourceFigures:
    """The source's own figures, from its divergence from itself."""
    return SourceFigures(loss=found.loss, perplexity=found.perplexity, draft_agreement=found.draft_agreement)


class EvaluationPass(Passes):
    """The one pass of an evaluation."""

    stages = (Stage.EVALUATION,)

    @override
    def pending(self, stage: Stage, *, limit: int) -> tuple[Shard, ...]:
        return pending_evaluation_shards(self.graph, self.run_store.recorded(stage), limit=limit)

    @override
    def droppable(self, stage: Stage, finished: Collection[Unit], left: Collection[Unit]) -> list[tuple[Stage, Unit]]:
        return droppable_evaluation_boundaries(self.graph, finished, left)

    @override
    def repair(self, error: DamagedError) -> None:
        if not error.key.startswith(f"{Stage.EVALUATION}/"):
            raise error  # a candidate; its own run repairs it
        super().repair(error)


@dataclass(frozen=True, kw_only=True)
class EvaluationSession:
    """One model and one text, on which variants are measured.

    `store` keeps the results. Variants use the `candidates` of a run store, or the `repository`. Without `drafts` the
    draft head is not run. `check` raises when the evaluation must stop.
    """

    config: Config
    source: TensorSource
    layout: Layout
    text: CalibrationSet
    store: Store
    events: Events
    check: Callable[[], None]
    open_workers: OpenWorkers
    candidates: str | None = None
    repository: TensorSource | None = None
    drafts: bool = True

    def measure(self, variants: Sequence[Variant]) -> list[Divergence]:
        """Figures of the source, then of each variant."""
        wanted = list({self._key(variant): variant for variant in variants}.items())
        missing = [(key, variant) for key, variant in wanted if self._read(key) is None]
        if self._read(self._key(None)) is None and not missing:
            missing = wanted[:1]
        size = self._at_once()
        for start in range(0, len(missing), size):
            self._run(missing[start : start + size])
        found = [self._read(key) for key in (self._key(None), *map(self._key, variants))]
        return [from_json(Divergence, record.metrics) for record in found if record is not None]

    def excess(self, variant: Variant, other: Variant) -> Excess:
        """The mean KL of one measured variant minus another's.

        Both use the same tokens, so variation between sequences cancels in the standard error.
        """
        ours, theirs = self.tokens_of(variant), self.tokens_of(other)
        found = mean_of(ours["kl"].double() - theirs["kl"].double(), ours["sequence"])
        return Excess(kl=found.mean, standard_error=found.standard_error)

    def tokens_of(self, variant: Variant) -> dict[str, Tensor]:
        """kl, agrees, loss and sequence per token (tokens,) of a measured variant."""
        record = self._read(self._key(variant))
        assert record is not None, "measure comes first"
        return read_tensors(self.store, record.artifacts["tokens"])

    # One pass -------------------------------------------------------------------------------------------------

    def _run(self, pairs: Sequence[tuple[str, Variant]]) -> None:
        variants = tuple(variant for _, variant in pairs)
        # An interrupted evaluation is stored by microbatch, so another microbatch size starts anew.
        parts = [str(self.config.calibration.microbatch), *(key for key, _ in pairs)]
        digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
        place = f"{self.store.uri.rstrip('/')}/{records.RUNNING_EVALUATION}/{digest}"
        running = Store(place)
        running.create(records.RUN, json.dumps({"evaluation": digest}).encode())
        run_store = RunStore(running)
        store_calibration(running, self.text, run=run_store.run)
        graph = self._graph
        evaluation = EvaluationPass(
            spec=sources.worker_spec(
                self.config,
                self.source,
                place,
                Evaluation(
                    variants=variants,
                    candidates=self.candidates,
                    repository=None if self.repository is None else absolute(self.repository.store.uri),
                ),
            ),
            memory_plan=evaluation_memory_plan(self.layout, self.config, self.text.tokens.shape[1], variants),
            graph=graph,
            run_store=run_store,
            events=self.events,
            check=self.check,
        )
        evaluation.run(self.open_workers)
        self._keep(run_store, graph, [self._key(None), *(key for key, _ in pairs)])
        # This also deletes abandoned evaluations.
        self.store.delete(self.store.list(records.RUNNING_EVALUATION))

    def _keep(self, run_store: RunStore, graph: PassGraph, keys: Sequence[str]) -> None:
        found = run_store.records(Stage.EVALUATION, graph.exits)
        pieces = [read_tensors(run_store.store, found[unit].artifacts["figures"]) for unit in graph.exits]
        sequence = torch.cat([piece["sequence"] for piece in pieces])
        columns = {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in TokenFigures._fields}
        agreement: list[float] = []
        for unit in graph.heads[: graph.draft]:
            draft = from_json(DraftRecord, run_store.record(Stage.EVALUATION, unit).metrics)
            agreement = [count / draft.tokens for count in draft.agreed]
        rerouted = self._rerouted(run_store, graph)
        for row, key in enumerate(keys):
            own = {name: column[row] for name, column in columns.items()}
            figures = summarize(TokenFigures(**own), sequence)
            if not all(map(math.isfinite, (figures.kl_mean, figures.loss, figures.perplexity))):
                model = self.source if row == 0 or self.repository is None else self.repository
                raise InputError(
                    f"{model.store.uri}: what it predicts is NaN or infinite (loss {figures.loss}); its weights are "
                    "finite and too large, fetch or make it again"
                )
            if agreement:
                figures = replace(figures, draft_agreement=agreement[row])
            if rerouted:
                figures = replace(figures, rerouted=rerouted[row])
            path = f"{records.EVALUATIONS}/{key}/{new_attempt()}/tokens.safetensors"
            artifact = write_tensors(self.store, path, {**own, "sequence": sequence})
            record = Record(artifacts={"tokens": artifact}, metrics=to_json(figures))
            write_record(self.store, records.evaluation_key(key), record)

    def _rerouted(self, run_store: RunStore, graph: PassGraph) -> list[float]:
        """By row, the share of tokens that meet other experts than in the source; a mean over mixture blocks."""
        stored = {index: run_store.record(Stage.EVALUATION, index) for index in sorted(graph.mixtures)}
        found = run_store.typed(RoutingRecord, Stage.EVALUATION, stored).values()
        shares = [[count / record.tokens for count in record.rerouted] for record in found]
        return [fmean(row) for row in zip(*shares, strict=True)]

    def _read(self, key: str) -> Record | None:
        place = records.evaluation_key(key)
        try:
            return read_record(self.store, place)
        except DamagedError:
            self.store.delete([place])  # it is measured again
            return None

    @property
    def _graph(self) -> PassGraph:
        texts = math.ceil(self.text.texts / self.config.calibration.microbatch)
        graph = PassGraph.of(self.layout, texts=texts, images=len(self.text.images))
        return graph if self.drafts else replace(graph, draft=False)

    def _at_once(self) -> int:
        """Variants per pass, limited by the activations sent between workers."""
        width = self.layout.row_width * self.config.model.bytes_per_value
        one = self.config.calibration.microbatch * self.text.tokens.shape[1] * width
        return max(1, _HOP_BYTES // one - 1)

    @cached_property
    def _depends_on(self) -> dict[str, str]:
        """The inputs that all figures depend on."""
        found = {
            "code": __version__,
            "model": self.source.fingerprint(),
            "tokens": self.text.fingerprint,
            "dtype": self.config.model.dtype,
            "threads": str(self.config.cluster.threads),
        }
        return found if self.repository is None else {**found, "repository": self.repository.fingerprint()}

    def _key(self, variant: Variant | None) -> str:
        """The key of a variant's record: a digest of everything that its figures depend on; None is the source."""
        body: dict[str, Any] = dict(self._depends_on)
        if variant is not None:
            body["activations"] = variant.activations
            body["choice"] = variant.choice
            body["cache"] = variant.cache
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]
