"""What the forward pass stored of a run's blocks, as tensors."""

from __future__ import annotations

from torch import Tensor

from actors.schedule.run_store import RunStore
from actors.schedule.units import Stage
from prismaquant_ray.block_records import CacheScales, ForwardRecord
from prismaquant_ray.factors import Equalization
from prismaquant_ray.formats import FormatName
from prismaquant_ray.records import FACTORS
from prismaquant_ray.storage.record import Record, read_tensors


class StoredBlocks:
    """Candidates and factors in a run store, by block."""

    def __init__(self, run_store: RunStore) -> None:
        self.run_store = run_store

    def tensors(self, block: int, name: FormatName) -> dict[str, Tensor]:
        """The candidates of a block in a format, by shipped name."""
        return read_tensors(self.run_store.store, self.run_store.candidates(block)[name])

    def equalization(self, block: int) -> Equalization:
        """The folds of a block with their factors; DamagedError when they do not fit its record."""
        record = self.run_store.record(Stage.FORWARD, block)
        if FACTORS not in record.artifacts:
            return ()
        folds = self._typed(block, record).folds
        factors = read_tensors(self.run_store.store, record.artifacts[FACTORS])
        return tuple((fold, factors[str(index)]) for index, fold in enumerate(folds))

    def cache(self, block: int) -> dict[str, CacheScales]:
        """The scales of an FP8 cache of a block, by attention."""
        return self._typed(block, self.run_store.record(Stage.FORWARD, block)).cache

    def _typed(self, block: int, record: Record) -> ForwardRecord:
        return self.run_store.typed(ForwardRecord, Stage.FORWARD, {block: record})[block]
