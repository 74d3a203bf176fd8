"""The memory plan: a GPU's memory and the host's apart, one memory for both where there is only one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.memory_plan import Free, MemoryPlan, Room, memory_plan, shard_size
from actors.worker import ShardWorker
from jobs.pipeline.run import Run
from prismaquant_ray.config import load_config
from prismaquant_ray.errors import ResourceError
from tests import inprocess
from tests.ray_cluster import ROOT
from tests.runs import configuration, measured
from tests.tiny import make_checkpoint

PLAN = MemoryPlan(
    base=1,
    working=2,
    exit=30,
    block_weights=4,
    block_hessians=3,
    block_candidates=5,
    block_activations=6,
    device=Room(fixed=10, block=20, exit=50),
    host=Room(fixed=100, block=7, exit=3),
    blocks=100,
    candidate_bytes=0,
    boundary=0,
    repository=0,
)


def test_a_worker_takes_of_each_memory_what_lies_there() -> None:
    assert PLAN.rooms(Free(memory=99)) == {"memory": (Room(fixed=3, block=18, exit=30), 99)}
    apart = Free(memory=99, host=999, gpu=True)
    assert PLAN.rooms(apart) == {"GPU memory": (PLAN.device, 99), "host memory": (PLAN.host, 999)}
    assert PLAN.shared == Room(fixed=110, block=27, exit=53)
    assert [PLAN.device.peak(blocks) for blocks in (1, 2, 3)] == [60, 60, 70]


def test_the_smaller_of_two_memories_decides() -> None:
    assert PLAN.fitting(Free(memory=210, host=10_000, gpu=True)) == 10
    assert PLAN.fitting(Free(memory=10_000, host=121, gpu=True)) == 3
    assert PLAN.fitting(Free(memory=110 + 4 * 27, gpu=True)) == 4
    assert PLAN.lacking(Free(memory=60, host=107, gpu=True)) is None
    gigabyte = 10**9
    large = replace(PLAN, device=Room(fixed=0, block=2 * gigabyte), host=Room(fixed=0, block=3 * gigabyte))
    lacking = large.lacking(Free(memory=gigabyte, host=gigabyte, gpu=True))
    assert lacking == "2.00 GB of GPU memory, 1.00 GB are free; 3.00 GB of host memory, 1.00 GB are free"
    assert large.lacking(Free(memory=2 * gigabyte, host=3 * gigabyte, gpu=True)) is None


def test_a_block_counts_on_a_gpu_without_what_is_read_ahead(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/models/qwen3.6-27b/inspect.yaml", ["model.dtype=bfloat16"])
    run = Run(config, weights=False)
    plan = memory_plan(run.layout, run.config, repository_bytes=0)
    largest = max(run.layout.blocks, key=lambda block: block.source_bytes)
    # The next shard's weights and candidates wait in the host's memory.
    assert plan.device.fixed < plan.working
    assert plan.host.block > largest.source_bytes
    many = shard_size(plan, run.config, workers=1, free=Free(memory=10**12, host=10**12, gpu=True))
    few = shard_size(plan, run.config, workers=1, free=Free(memory=10**12, host=3 * 10**10, gpu=True))
    assert few.fitting < many.fitting


def test_a_card_that_is_too_small_ends_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(ShardWorker):
        """With a card of 1 kB."""

        def _machine(self) -> Any:
            return replace(super()._machine(), device="a small card", free_bytes=1000, host_free_bytes=10**11)

        def run(self, *_: Any) -> Any:
            raise AssertionError("nothing is run")

    monkeypatch.setattr(inprocess, "ShardWorker", Small)
    config = configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"))
    expected = r"\(a small card\) cannot hold one block at a time: 0\.\d\d GB of GPU memory, 0\.00 GB are free; lower"
    with pytest.raises(ResourceError, match=expected) as raised:
        measured(config)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 3
