"""A shard while a worker holds it: its loaded units, microbatch by microbatch, then what they leave behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from actors.course import Course
from actors.ledger import Ledger
from actors.messages import Activation, Shard, Stage, Unit, from_wire, to_wire, unit_key
from actors.transfer import Inbox, Outbox, read_boundary
from prismaquant_ray.calibration.batches import Batch, CalibrationSet
from prismaquant_ray.checkpoint.decoded_candidates import CandidateTensors
from prismaquant_ray.config import Config
from prismaquant_ray.evaluation.variants import Variants
from prismaquant_ray.formats import FormatName
from prismaquant_ray.models.ahead import Ahead
from prismaquant_ray.models.runner import ModelRunner
from prismaquant_ray.rounding.encode import Rounding
from prismaquant_ray.sensitivity.fisher import Loss
from prismaquant_ray.storage.record import Artifact, Record, new_attempt, read_tensors, write_tensors


@dataclass(kw_only=True, eq=False)
class Workshop:
    """What every visit of a worker uses. The head stays loaded from one exit to the next."""

    config: Config
    ledger: Ledger
    runner: ModelRunner
    calibration: CalibrationSet
    rounding: Rounding
    thread: ThreadPoolExecutor
    variants: Variants | None = None
    head: ExitStack | None = None

    def __post_init__(self) -> None:
        #: Candidates of blocks, as the backward pass takes them.
        self.candidates: Ahead[int, tuple[CandidateTensors, int]] = Ahead(self._read_candidates)

    def _read_candidates(self, block: int) -> tuple[CandidateTensors, int]:
        """With their bytes."""
        artifacts = self.ledger.record(Stage.FORWARD, block).artifacts
        tensors = {FormatName(name): read_tensors(self.ledger.store, each) for name, each in artifacts.items()}
        return tensors, sum(each.size for each in artifacts.values())

    def expect(self, shard: Shard | None) -> None:
        """Read what a shard loads ahead of it, or nothing; what was read ahead for another one is let go of."""
        blocks = [unit for unit in shard.units if isinstance(unit, int)] if shard is not None else []
        self.runner.ahead.expect(blocks)
        backward = shard is not None and shard.stage is Stage.BACKWARD
        self.candidates.expect([block for block in blocks if backward and shard and block in shard.produce])

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """Every microbatch: texts, then images."""
        return self.calibration.batches(self.config.calibration.microbatch)

    @cached_property
    def course(self) -> Course:
        """What reads what."""
        images = len(self.calibration.images)
        return Course.of(self.runner.layout, texts=len(self.batches) - images, images=images)

    @property
    def loss(self) -> Loss:
        """The loss of the model and of its draft head."""
        config, layout = self.config.calibration, self.runner.layout
        return Loss(
            labels=config.labels, seed=config.seed, vocab_size=layout.vocab_size, image_token=layout.image_token
        )

    def inbox(self, shard: Shard, stage: Stage, units: tuple[Unit, ...]) -> Inbox:
        """What the units of a pass put out, for the microbatches of a shard."""
        store = self.ledger.store
        return Inbox(store, self.thread, lambda: self.ledger.boundary(stage, *units), shard.microbatches)

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


class Visit(ABC):
    """One attempt at a shard. Microbatches must come in order, then `finish`; `close` gives the weights up."""

    #: Whether anything reads what its last unit puts out.
    is_read: ClassVar[bool] = True

    def __init__(self, shop: Workshop, shard: Shard) -> None:
        self.shop = shop
        self.shard = shard
        self.attempt = new_attempt()
        self.resident = ExitStack()
        self.outbox = Outbox(shop.ledger.store, shop.thread)
        self.moved = {"read": 0, "written": 0}
        self.facts: dict[str, float] = {}
        self.reported: set[int] = set()
        self.arrivals = shop.inbox(shard, shard.stage, shard.origins)
        self.start()

    @abstractmethod
    def start(self) -> None:
        """Load the units."""

    @abstractmethod
    def step(self, microbatch: int, arriving: Tensor) -> Tensor:
        """What leaves the last unit."""

    @abstractmethod
    def products(self) -> Iterator[tuple[Unit, Record]]:
        """The record of each unit that must produce something; its data is stored, and its weights are let go."""

    def run(self, microbatch: int, arriving: Activation | Artifact | None) -> tuple[Activation, dict[str, Any]]:
        """One microbatch; the boundary goes to the store behind what follows."""
        leaving = self.step(microbatch, self._arriving(microbatch, arriving)).detach().cpu().contiguous()
        if self.is_read:
            key = f"{self._directory(self.shard.units[-1])}/boundary-{microbatch:05d}.safetensors"
            self.outbox.put(microbatch, key, leaving)
        wire = to_wire(leaving)
        hop = arriving[1].nbytes if isinstance(arriving, tuple) else 0
        tokens = self.shop.batches[microbatch].tokens.numel()
        return wire, {"tokens": tokens, "hop_bytes": hop, **self.facts}

    def stored(self) -> dict[int, Artifact]:
        """Boundaries that have reached the store since the last call."""
        fresh = {m: artifact for m, artifact in self.outbox.completed().items() if m not in self.reported}
        self.reported |= fresh.keys()
        return fresh

    def finish(self) -> None:
        """Commit the boundary, then each unit's record: whatever is interrupted, what is recorded can be built on."""
        if self.is_read:
            boundary = self.outbox.flush()
            self.shop.ledger.write_boundary(self.shard.stage, self.shard.units[-1], boundary)
            self.moved["written"] += sum(artifact.size for artifact in boundary.values())
        for unit, record in self.products():
            self.moved["written"] += sum(artifact.size for artifact in record.artifacts.values())
            self.shop.ledger.write_record(self.shard.stage, unit, record)
        self.close()

    def close(self) -> None:
        """Let go of what is loaded."""
        self.resident.close()

    def _arriving(self, microbatch: int, arriving: Activation | Artifact | None) -> Tensor:
        if not self.shard.origins:
            return torch.empty(0)
        if isinstance(arriving, tuple):
            return from_wire(arriving).to(self.shop.runner.device)
        found, size = (
            read_boundary(self.shop.ledger.store, arriving)
            if isinstance(arriving, Artifact)
            else self.arrivals.get(microbatch)
        )
        self.moved["read"] += size
        return found.to(self.shop.runner.device)

    def _directory(self, unit: Unit) -> str:
        return f"{self.shard.stage}/{unit_key(unit)}/{self.attempt}"

    def _write(self, unit: Unit, name: str, tensors: Mapping[str, Tensor]) -> Artifact:
        return write_tensors(self.shop.ledger.store, f"{self._directory(unit)}/{name}.safetensors", tensors)
