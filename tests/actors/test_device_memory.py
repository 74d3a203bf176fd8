"""A device without memory for a shard: shards shrink and the run goes on, or it ends and says what was planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.schedule.units import Shard
from actors.worker import ShardWorker
from prismaquant_ray.errors import ResourceError
from prismaquant_ray.events import ShardsShrunk, read_events
from prismaquant_ray.storage.store import Store
from tests import inprocess
from tests.runs import configuration, digests, quantized
from tests.tiny import make_checkpoint


def small(fits: Callable[[Shard], bool]) -> type[ShardWorker]:
    """A worker whose device has no memory left in the middle of shards that do not fit."""

    class Small(ShardWorker):
        """It forgets nothing that it was told."""

        def run(self, shard: Shard, microbatch: int, arriving: Any) -> Any:
            if microbatch == shard.microbatches[-1] and not fits(shard):
                with self._answering(shard) as call:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
                return None, call.receipt
            return super().run(shard, microbatch, arriving)

    return Small


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_shrink_until_they_fit_and_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    settings = ("cluster.blocks_per_shard=2", "formats=[NVFP4, BF16]")
    whole, shrunk = (configuration(tmp_path / name, source, *settings) for name in ("whole", "shrunk"))
    quantized(whole)
    monkeypatch.setattr(inprocess, "ShardWorker", small(lambda shard: len(shard.units) == 1))
    quantized(shrunk, workers)
    events = [event for event in read_events(Store(shrunk.store.run)) if isinstance(event, ShardsShrunk)]
    assert [event.blocks for event in events] == [1]
    assert "has no memory left for forward 0000-0001: CUDA out of memory" in events[0].message
    assert digests(Path(whole.store.output)) == digests(Path(shrunk.store.output))


def test_one_block_that_does_not_fit_ends_the_run_with_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"), "cluster.blocks_per_shard=2")
    monkeypatch.setattr(inprocess, "ShardWorker", small(lambda shard: not isinstance(shard.units[0], int)))
    with pytest.raises(ResourceError, match=r"forward 0000: .*, with one block at a time, for which .* GB are planned"):
        quantized(config)
