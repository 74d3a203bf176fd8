"""A shard's end: what is stored while what is encoded, and that nothing is committed before it is stored."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from actors.schedule.run_store import RunStore
from actors.schedule.units import Stage
from actors.shard_task import Attempt
from prismaquant_ray.errors import StoreError
from prismaquant_ray.forward.block import BlockForward
from prismaquant_ray.storage.store import Store
from tests.runs import configuration, measured
from tests.tiny import make_checkpoint

SETTINGS = ("formats=[NVFP4, MXFP8, BF16]", "cluster.blocks_per_shard=2")


def test_a_block_is_stored_while_the_next_one_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = {index: threading.Event() for index in range(2)}
    finish, write = BlockForward.finish, Attempt.write
    met = []

    def finishing(block: BlockForward) -> Any:
        encoding[block.block.index].set()
        return finish(block)

    def writing(attempt: Attempt, unit: Any, name: str, tensors: Any) -> Any:
        if unit == 0:
            met.append(encoding[1].wait(timeout=60))
        return write(attempt, unit, name, tensors)

    monkeypatch.setattr(BlockForward, "finish", finishing)
    monkeypatch.setattr(Attempt, "write", writing)
    measured(configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"), *SETTINGS))
    assert met == [True, True, True], "two formats and the factors"


def test_a_block_that_cannot_be_stored_has_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"), *SETTINGS)
    write = Attempt.write

    def writing(attempt: Attempt, unit: Any, name: str, tensors: Any) -> Any:
        if unit == 1 and name == "MXFP8":
            raise StoreError("no room")
        return write(attempt, unit, name, tensors)

    monkeypatch.setattr(Attempt, "write", writing)
    with pytest.raises(StoreError, match="no room"):
        measured(config)
    assert RunStore(Store(config.store.run)).recorded(Stage.FORWARD).done == {0}


def test_a_block_is_recorded_although_the_next_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"), *SETTINGS)
    finish = BlockForward.finish

    def finishing(block: BlockForward) -> Any:
        if block.block.index == 1:
            raise StoreError("no memory")
        return finish(block)

    monkeypatch.setattr(BlockForward, "finish", finishing)
    with pytest.raises(StoreError, match="no memory"):
        measured(config)
    assert RunStore(Store(config.store.run)).recorded(Stage.FORWARD).done == {0}
