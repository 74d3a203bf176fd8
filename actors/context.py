"""State that a worker keeps across shards: model, calibration set, run store, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from actors.schedule.pass_graph import PassGraph
from actors.schedule.run_store import RunStore
from actors.schedule.units import Shard, Stage
from actors.stored_blocks import StoredBlocks
from prismaquant_ray.backward.loss import GPU_LOGIT_BYTES, LOGIT_BYTES, Loss
from prismaquant_ray.backward.price import Split
from prismaquant_ray.calibration.dataset import Batch, CalibrationSet
from prismaquant_ray.config import Config
from prismaquant_ray.evaluation.variants import Variants
from prismaquant_ray.forward.decoded_candidates import CandidateTensors
from prismaquant_ray.forward.encode import Rounding
from prismaquant_ray.model.prefetch import Prefetcher
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.storage.record import read_tensors


@dataclass(kw_only=True, eq=False)
class WorkerContext:
    """State shared by all shard tasks of a worker. The head stays loaded from one exit to the next.

    `threads` write to the run store, and read boundaries.
    """

    config: Config
    run_store: RunStore
    runner: ModelRunner
    calibration: CalibrationSet
    rounding: Rounding
    threads: ThreadPoolExecutor
    variants: Variants | None = None
    head: ExitStack | None = None

    def __post_init__(self) -> None:
        #: Candidates by block, for the backward pass.
        self.candidates: Prefetcher[int, tuple[CandidateTensors, int]] = Prefetcher(self._read_candidates)

    def _read_candidates(self, block: int) -> tuple[CandidateTensors, int]:
        """Tensors by format, and their total bytes."""
        artifacts = self.run_store.candidates(block)
        tensors = {name: read_tensors(self.run_store.store, each) for name, each in artifacts.items()}
        return tensors, sum(each.size for each in artifacts.values())

    @property
    def stored(self) -> StoredBlocks:
        """What the forward pass stored."""
        return StoredBlocks(self.run_store)

    def prefetch(self, shard: Shard | None) -> None:
        """Prefetch weights and candidates of a shard, or nothing; those prefetched for another one are dropped."""
        blocks = [unit for unit in shard.units if isinstance(unit, int)] if shard is not None else []
        self.runner.prefetcher.prefetch(blocks)
        backward = shard is not None and shard.stage is Stage.BACKWARD
        self.candidates.prefetch([block for block in blocks if backward and shard and block in shard.produce])

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """Every microbatch: texts, then images."""
        return self.calibration.batches(self.config.calibration.microbatch)

    @cached_property
    def split(self) -> Split:
        """Which calibration tokens no candidate is fitted to."""
        return Split.of(self.calibration)

    @cached_property
    def graph(self) -> PassGraph:
        """The units of every pass and their dependencies."""
        images = len(self.calibration.images)
        return PassGraph.of(self.runner.layout, texts=len(self.batches) - images, images=images)

    @property
    def loss(self) -> Loss:
        """The loss of the model and of its draft head."""
        return loss_of(self.config, self.runner)

    @property
    def models(self) -> Variants:
        """The models of an evaluation, the source first."""
        assert self.variants is not None
        return self.variants

    def load_head(self) -> None:
        """Final norm and head, unless they are loaded."""
        if self.head is None:
            self.head = ExitStack()
            models = self.variants
            self.head.enter_context(self.runner.exit() if models is None else models.resident(ModelRunner.exit))

    def unload_head(self) -> None:
        """Make room for blocks."""
        if self.head is not None:
            self.head.close()
            self.head = None


def loss_of(config: Config, runner: ModelRunner) -> Loss:
    """The loss of a run's model and of its draft head."""
    return Loss(
        labels=config.calibration.labels,
        seed=config.calibration.seed,
        vocab_size=runner.layout.vocab_size,
        image_token=runner.layout.image_token,
        logit_bytes=LOGIT_BYTES if runner.device.type == "cpu" else GPU_LOGIT_BYTES,
    )
