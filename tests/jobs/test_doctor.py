"""`doctor`: what it says about good workers and bad ones, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors import diagnosis
from actors.protocol import Call, CallKind
from actors.schedule.recovery import Cause
from actors.worker import ShardWorker
from jobs.commands import doctor as command
from jobs.pipeline.diagnosis import Diagnosis, doctor
from prismaquant_ray import device_checks
from prismaquant_ray.config import Config
from prismaquant_ray.errors import StoreError
from prismaquant_ray.serialization import to_json
from tests import inprocess
from tests.inprocess import in_process, unopened
from tests.repositories import SEVEN
from tests.runs import configuration
from tests.tiny import make_checkpoint


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_PRODUCT", {"cpu": 64})
    monkeypatch.setattr(diagnosis, "_ENCODED", {"cpu": (32, 128)})
    monkeypatch.setattr(diagnosis, "_STORED", 1 << 16)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    formats = f"formats=[{', '.join(SEVEN)}]"
    return configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"), formats, "cluster.workers=2")


def failed(found: Diagnosis) -> dict[str, str]:
    return {f"{worker} {check.name}": check.found for worker, check in found.failed}


def test_good_workers_pass_and_the_job_has_a_time(config: Config) -> None:
    found = doctor(config, open_workers=in_process(2))
    assert failed(found) == {}
    assert found.exit_code == 0
    names = [check.name for check in found.workers[1].checks]
    assert {"version", "memory", "products in float32", "int4 weights", "nvfp4 weights", "FP8 activations"} <= {*names}
    assert "NVFP4A16 activations" not in names, "it rounds none"
    assert [stage.stage for stage in found.stages][:3] == ["forward pass", "encoding", "backward pass"]
    assert all(stage.seconds > 0 for stage in found.stages)
    assert not Path(config.store.run).exists()
    json.dumps(to_json(found))


def test_twice_the_workers_take_half_the_time(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = diagnosis.Rates(products=1e6, encoding=1e4, to_device=None, to_host=None, digest=1e9, write=1e9, read=1e9)
    monkeypatch.setattr(diagnosis, "_rates", lambda *_: rates)
    one, two = (doctor(config, open_workers=in_process(workers)) for workers in (1, 2))
    for alone, together in zip(one.stages[:3], two.stages[:3], strict=True):
        assert together.compute == pytest.approx(alone.compute / 2)
    # By hand: seven Linears of two layers, 96 tokens of four sequences, in the passes' products and second moments.
    tokens = config.calibration.sequences * config.calibration.length
    linears = 2 * (64 * (64 + 32 + 32 + 160 + 160) + 64 * 64 + 160 * 64)
    moments = 2 * (64**2 + 64**2 + 64**2 + 160**2)
    assert one.stages[0].compute == pytest.approx(tokens * (2 * linears + moments) / 1e6)
    assert one.stages[1].compute == pytest.approx(linears / 1e4)


def test_what_a_run_store_holds_stays(config: Config) -> None:
    run = Path(config.store.run)
    run.mkdir(parents=True)
    (run / "kept").write_text("kept")
    doctor(config, open_workers=in_process(1))
    assert [path.name for path in run.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_rounded", lambda rounded: (replace(rounded[0], values=-rounded[0].values), *rounded[1:])),
        ("_rounded", lambda rounded: (rounded[0], rounded[1], rounded[0])),
    ],
    ids=["values", "gptq"],
)
def test_a_device_that_rounds_otherwise_fails(
    config: Config, monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[[Any], Any]
) -> None:
    function, calls = getattr(device_checks, name), iter(range(1000))

    def every_second(*args: Any) -> Any:
        found = function(*args)
        return broken(found) if next(calls) % 2 else found

    monkeypatch.setattr(device_checks, name, every_second)
    found = doctor(config, open_workers=in_process(1))
    assert {key.partition(" ")[2] for key in failed(found)} == {
        f"{name} weights" for name in ("int4", "mxfp4", "nvfp4", "fp8", "mxfp8")
    }
    assert found.exit_code == 3


def test_a_worker_with_too_little_memory_fails(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(ShardWorker):
        def _machine(self) -> Any:
            return replace(super()._machine(), free_bytes=10**8)

    monkeypatch.setattr(inprocess, "ShardWorker", Small)
    found = doctor(config, open_workers=in_process(1))
    assert list(failed(found)) == ["worker-0 memory"]
    assert "GB of 0.10 GB of memory" in failed(found)["worker-0 memory"]


def test_a_worker_that_dies_is_named_and_the_others_are_examined(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    def accident(worker: str, call: Call) -> Cause | None:
        return Cause.PROCESS if worker == "worker-0" and call.kind is CallKind.DIAGNOSE else None

    found = doctor(config, open_workers=in_process(2, accident))
    assert failed(found) == {"worker-0 worker": "as the test wanted"}
    assert found.workers[1].diagnosis is not None

    from rich.console import Console

    command.render(found, Console(width=200))
    printed = capsys.readouterr().out
    assert "FAILED worker: as the test wanted" in printed
    assert "1 of " in printed


def test_a_place_that_cannot_be_written_is_said_before_a_worker_starts(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"store": config.store.model_copy(update={"run": tmp_path / "file" / "run"})})
    with pytest.raises(StoreError, match="file is not one; choose another place"):
        doctor(blocked, open_workers=unopened)
