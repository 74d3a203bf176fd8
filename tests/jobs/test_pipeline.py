"""The whole job on tiny checkpoints, workers in this process: every architecture, resuming, targets, bad input."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from actors.protocol import Call, CallKind
from actors.schedule.recovery import Cause
from actors.schedule.units import Exit, Stage, unit_key
from jobs.commands import assemble, verify
from jobs.pipeline.run import Run
from jobs.pipeline.workers import WorkerPool
from prismaquant_ray.config import Config, load_config
from prismaquant_ray.errors import InputError
from prismaquant_ray.events import read_events
from prismaquant_ray.formats import FormatName
from prismaquant_ray.records import RUN, RunRecord
from prismaquant_ray.report.summary import summarize_probe
from prismaquant_ray.serialization import from_bytes
from tests.inprocess import InProcessWorkers, after, in_process, unopened
from tests.runs import assembled, configuration, digests, full_configuration, quantized
from tests.tiny import ARCHITECTURES, make_checkpoint
from tests.tiny_families import make_family

pytestmark = pytest.mark.slow

# All that the tiny model's shapes can take; tests/jobs/test_other_formats.py has the others.
ALL_FORMATS = [str(name) for name in FormatName if name not in ("FP8_BLOCK", "INT4A8", "MXFP4A8")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama", layers=3, shards=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Config:
    """A finished run with every format; do not write into it."""
    config = configuration(tmp_path_factory.mktemp("run"), source, f"formats=[{','.join(ALL_FORMATS)}]")
    quantized(config)
    return config


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, str]:
    """What an undisturbed run writes."""
    config = configuration(tmp_path_factory.mktemp("expected"), source)
    quantized(config)
    return digests(config.store.output)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_goes_through(tmp_path: Path, architecture: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "source", architecture)
    config = configuration(tmp_path / "run", checkpoint)
    result = quantized(config)
    assert 0 < 6.0 - result.bpp < 0.5
    assert verify.run(config).ok
    written = json.loads((config.store.output / "config.json").read_text())
    original = json.loads((checkpoint / "config.json").read_text())
    assert {key: value for key, value in written.items() if key != "quantization_config"} == original


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with everything: 2 blocks and a merger that see, 4 that decode, a draft, a head; experts and images."""
    return make_family(tmp_path_factory.mktemp("source") / "qwen3_5_moe", "qwen3_5_moe", shards=2)


@pytest.fixture(scope="module")
def finished_seeing(tmp_path_factory: pytest.TempPathFactory, seeing: Path) -> Config:
    """An undisturbed run of it; do not write into it."""
    config = full_configuration(tmp_path_factory.mktemp("expected"), seeing)
    quantized(config)
    return config


@pytest.fixture(scope="module")
def expected_of_seeing(finished_seeing: Config) -> dict[str, str]:
    return digests(finished_seeing.store.output)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [29, 83])
def test_a_stopped_run_of_a_model_with_everything_continues_to_the_same_bytes(
    tmp_path: Path, seeing: Path, expected_of_seeing: dict[str, str], steps: int
) -> None:
    config = full_configuration(tmp_path, seeing, "cluster.blocks_per_shard=2")
    with pytest.raises(KeyboardInterrupt):
        Run(config, open_workers=in_process(2, after(steps))).measure()
    recorded = {path: path.read_bytes() for path in config.store.run.rglob("record.json")}
    config = full_configuration(tmp_path, seeing, "cluster.blocks_per_shard=3")
    quantized(config, workers=1)
    assert digests(config.store.output) == expected_of_seeing
    assert {path: path.read_bytes() for path in recorded} == recorded, "finished work was done again"
    left = Counter(path.name for path in config.store.run.rglob("*") if path.is_file() and "ard/" in str(path))
    assert left == {"record.json": 18, "NVFP4.safetensors": 9, "MXFP8.safetensors": 9, "factors.safetensors": 7}


@pytest.mark.slow
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), workers=st.integers(1, 4), blocks=st.integers(1, 3))
def test_lost_workers_change_no_byte_of_a_model_with_everything(
    seeing: Path, expected_of_seeing: dict[str, str], seed: int, workers: int, blocks: int
) -> None:
    chance = random.Random(seed)
    lost: list[str] = []

    def accident(worker: str, call: Call) -> Cause | None:
        if call.kind in (CallKind.RUN, CallKind.FINISH) and len(lost) < 6 and chance.random() < 0.08:
            lost.append(worker)
            return Cause.NODE
        return None

    with tempfile.TemporaryDirectory() as directory:
        config = full_configuration(Path(directory), seeing, f"cluster.blocks_per_shard={blocks}")
        run = Run(config, open_workers=in_process(workers, accident))
        run.measure()
        assembled(run)
        assert digests(config.store.output) == expected_of_seeing
        assert [event.event for event in read_events(run.store)].count("lost") == len(lost)


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim",
    [
        "forward/0000/*/NVFP4.safetensors",
        "forward/0002/*/MXFP8.safetensors",
        "forward/0007/*/NVFP4.safetensors",
        "forward/0008/record.json",
        "backward/0001/record.json",
        "backward/0007/record.json",
        "backward/0008/record.json",
    ],
)
def test_a_damaged_object_of_a_tower_a_draft_or_a_head_is_made_again(
    tmp_path: Path, seeing: Path, finished_seeing: Config, expected_of_seeing: dict[str, str], victim: str
) -> None:
    config = full_configuration(tmp_path, seeing, "cluster.blocks_per_shard=2")
    shutil.copytree(finished_seeing.store.run, config.store.run)
    damage(next(config.store.run.glob(victim)), "cut")
    run = Run(config, open_workers=in_process(2))
    assembled(run)
    assert digests(config.store.output) == expected_of_seeing
    repairs = [event.key for event in read_events(run.store) if event.event == "repair"]
    assert [Path(key).match(victim) for key in repairs] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, source: Path, expected: dict[str, str], workers: int
) -> None:
    config = configuration(tmp_path, source)
    quantized(config, workers)
    assert digests(config.store.output) == expected
    assert "model.safetensors.index.json" in expected


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_any_shard_size_writes_the_same_bytes(
    tmp_path: Path, source: Path, expected: dict[str, str], blocks: int
) -> None:
    config = configuration(tmp_path, source, f"cluster.blocks_per_shard={blocks}")
    quantized(config, workers=2)
    assert digests(config.store.output) == expected


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 7, 13, 18, 26])
@pytest.mark.parametrize(("before", "then"), [(1, 1), (2, 1), (1, 3)])
def test_a_stopped_run_continues_to_the_same_bytes_with_another_shard_size(
    tmp_path: Path, source: Path, expected: dict[str, str], steps: int, before: int, then: int
) -> None:
    config = configuration(tmp_path, source, f"cluster.blocks_per_shard={before}")
    with suppress(KeyboardInterrupt):  # with large shards there are fewer steps than that
        Run(config, open_workers=in_process(2, after(steps))).measure()
    recorded = {path: path.read_bytes() for path in config.store.run.rglob("record.json")}
    config = configuration(tmp_path, source, f"cluster.blocks_per_shard={then}")
    quantized(config, workers=1)
    assert digests(config.store.output) == expected
    assert {path: path.read_bytes() for path in recorded} == recorded, "finished work was done again"
    # What the stopped attempt wrote without a record is gone: two passes over three blocks leave just this.
    left = Counter(path.name for path in config.store.run.rglob("*") if path.is_file() and "ard/" in str(path))
    assert left == {"record.json": 6, "NVFP4.safetensors": 3, "MXFP8.safetensors": 3, "factors.safetensors": 3}


@pytest.mark.parametrize("stuck", [("forward", 1), ("backward", 1)])
def test_a_hole_in_a_stopped_pass_is_filled_and_nothing_else_repeated(
    tmp_path: Path, source: Path, expected: dict[str, str], stuck: tuple[str, Any]
) -> None:
    stage, unit = Stage(stuck[0]), stuck[1]
    config = configuration(tmp_path, source, "cluster.blocks_per_shard=1")

    def never_finish(worker: str, call: Call) -> None:
        if call.kind is CallKind.FINISH and (call.shard.stage, call.shard.units) == (stage, (unit,)):
            waiting = opened[-1].queue
            if all(other.kind not in (CallKind.RUN, CallKind.FINISH) for _, other in waiting):
                raise KeyboardInterrupt
            waiting.append((worker, call))
            raise _Later

    class _Later(Exception):  # noqa: N818
        pass

    opened: list[Any] = []

    class Patient(InProcessWorkers):
        def wait(self, timeout: float) -> Any:
            try:
                return super().wait(timeout)
            except _Later:
                return []

    @contextmanager
    def open_workers(spec: Any, at_most: int) -> Any:
        opened.append(Patient(spec, never_finish))
        yield WorkerPool(workers=opened[-1], wanted=2, sharing=lambda: 1)

    with pytest.raises(KeyboardInterrupt):
        Run(config, open_workers=open_workers).measure()
    recorded = {path: path.read_bytes() for path in config.store.run.rglob("record.json")}
    assert config.store.run / str(stage) / unit_key(unit) / "record.json" not in recorded
    again: list[Any] = []
    Run(config, open_workers=in_process(2, opened=again)).measure()
    run = [call.shard.units for _, call in again[0].log if call.kind is CallKind.FINISH and call.shard.stage is stage]
    assert run == [(unit,)]
    assert {path: path.read_bytes() for path in recorded} == recorded
    quantized(config)
    assert digests(config.store.output) == expected


def test_an_exit_that_another_worker_is_still_running_is_no_damage(
    tmp_path: Path, source: Path, expected: dict[str, str]
) -> None:
    config = configuration(tmp_path, source)
    last = Exit(config.calibration.sequences // config.calibration.microbatch)

    def before_the_last_exit(worker: str, call: Call) -> None:
        if call.kind is CallKind.RUN and call.shard.units == (last,):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(config, open_workers=in_process(accident=before_the_last_exit)).measure()
    again: list[InProcessWorkers] = []
    run = Run(config, open_workers=in_process(2, opened=again))
    run.measure()
    log = [(call.kind, call.shard.units) for _, call in again[0].log if call.shard is not None]
    first = next(units for kind, units in log if kind is CallKind.RUN and not isinstance(units[0], Exit))
    assert log.index((CallKind.RUN, first)) < log.index((CallKind.FINISH, (last,))), "not what it tests"
    assert not [event for event in read_events(run.store) if event.event == "repair"]
    assembled(run)
    assert digests(config.store.output) == expected


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    workers=st.integers(1, 4),
    blocks=st.integers(1, 3),
    cause=st.sampled_from([Cause.NODE, Cause.PROCESS]),
)
def test_lost_workers_change_no_byte_and_cost_at_most_a_shard_each(
    source: Path, expected: dict[str, str], seed: int, workers: int, blocks: int, cause: Cause
) -> None:
    chance = random.Random(seed)
    lost: list[str] = []
    most = 2 if cause is Cause.PROCESS else 4  # a shard that loses three workers by itself ends the run

    def accident(worker: str, call: Call) -> Cause | None:
        if call.kind in (CallKind.RUN, CallKind.FINISH) and len(lost) < most and chance.random() < 0.08:
            lost.append(worker)
            return cause
        return None

    opened: list[Any] = []
    with tempfile.TemporaryDirectory() as directory:
        config = configuration(Path(directory), source, f"cluster.blocks_per_shard={blocks}")
        run = Run(config, open_workers=in_process(workers, accident, opened))
        run.measure()
        assembled(run)
        assert digests(config.store.output) == expected
        repeated = Counter(
            (call.shard.stage, call.shard.name, call.microbatch, call.kind) for _, call in opened[0].log if call.shard
        )
        extra = sum(count - 1 for count in repeated.values())
        microbatches = 3
        assert extra <= len(lost) * microbatches
        events = [event.event for event in read_events(run.store)]
        assert events.count("lost") == len(lost)


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim",
    [
        "forward/0001/*/NVFP4.safetensors",
        "forward/0000/record.json",
        "backward/0002/record.json",
        "calibration/*/tokens.safetensors",
        "layout.json",
    ],
)
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_damaged_object_of_a_finished_run_is_made_again(
    tmp_path: Path, source: Path, expected: dict[str, str], victim: str, harm: str
) -> None:
    config = configuration(tmp_path, source, "cluster.blocks_per_shard=2")
    quantized(config)
    damage(next(config.store.run.glob(victim)), harm)
    shutil.rmtree(config.store.output)
    run = Run(config, open_workers=in_process())
    assembled(run)
    assert digests(config.store.output) == expected


@pytest.mark.parametrize(("block", "stage"), [(0, "backward"), (2, "backward"), (1, "forward")])
def test_a_changed_digit_of_a_record_is_noticed(
    tmp_path: Path, source: Path, expected: dict[str, str], block: int, stage: str
) -> None:
    """What is still JSON is not what was written."""
    config = configuration(tmp_path, source, "cluster.blocks_per_shard=2")
    quantized(config)
    record = config.store.run / stage / f"{block:04d}" / "record.json"
    text = record.read_text()
    figure = '"cost": 0.' if stage == "backward" else '"weight_mse": '
    place = text.index(figure) + len(figure)
    record.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    assert json.loads(record.read_text()) != json.loads(text)
    shutil.rmtree(config.store.output)
    run = Run(config, open_workers=in_process())
    assembled(run)
    assert digests(config.store.output) == expected
    assert [event.event for event in read_events(run.store)].count("repair") == 1


@pytest.mark.parametrize("victim", ["forward/0000/*/boundary-00001.safetensors", "forward/0001/*/MXFP8.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_an_object_damaged_during_a_run_is_made_again(
    tmp_path: Path, source: Path, expected: dict[str, str], victim: str, harm: str
) -> None:
    config = configuration(tmp_path, source, "cluster.blocks_per_shard=1")
    done = []

    def spoil(worker: str, call: Call) -> None:
        if call.shard and call.shard.stage is Stage.BACKWARD and not done:
            done.append(call)
            damage(next(config.store.run.glob(victim)), harm)

    run = Run(config, open_workers=in_process(2, spoil))
    run.measure()
    assembled(run)
    assert digests(config.store.output) == expected
    assert done
    assert [event.event for event in read_events(run.store)].count("repair") == 1


def damage(path: Path, harm: str) -> None:
    data = bytearray(path.read_bytes())
    if harm == "delete":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x40
        path.write_bytes(data)


def test_fresh_starts_over(tmp_path: Path, source: Path, expected: dict[str, str]) -> None:
    quantized(configuration(tmp_path, source, "calibration.seed=5"))
    config = configuration(tmp_path, source)
    with pytest.raises(InputError, match="--fresh"):
        quantized(config)
    run = Run(config, open_workers=in_process(), fresh=True)
    run.measure()
    assembled(run)
    assert digests(config.store.output) == expected


def test_finished_work_is_not_repeated(finished: Config) -> None:
    run = Run(finished, open_workers=unopened)
    assert summarize_probe(run.measured().data).blocks == 3


def test_a_new_target_needs_only_the_store(tmp_path: Path, finished: Config) -> None:
    config = finished.model_copy(
        update={
            "budget": finished.budget.model_copy(update={"bpp": 5.123}),
            "store": finished.store.model_copy(update={"output": tmp_path / "other"}),
        }
    )
    result = assemble.run(config)
    assert result.bpp <= 5.123
    assert verify.run(config).ok


def test_sweep_is_optimal_never_over_and_falls(finished: Config) -> None:
    swept = Run(finished).measured().sweep
    assert swept.out_of_reach == []
    losses = [plan.predicted_loss for plan in swept.targets]
    assert losses == sorted(losses, reverse=True)
    for plan in swept.targets:
        assert plan.bpp <= float(plan.target.removesuffix("bpp"))
        assert plan.gap == 0.0
    assert swept.knee is not None
    assert swept.knee.from_bpp <= swept.knee.bpp <= swept.knee.to_bpp


def test_a_budget_in_bytes_counts_every_byte(tmp_path: Path, finished: Config) -> None:
    smallest, largest = bounds(finished)
    budget = (smallest + largest) // 2
    config = finished.model_copy(
        update={
            "budget": finished.budget.model_copy(update={"bpp": None, "bytes": budget}),
            "store": finished.store.model_copy(update={"output": tmp_path / "bytes"}),
        }
    )
    assemble.run(config)
    total = sum(path.stat().st_size for path in config.store.output.iterdir())
    assert total <= budget


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_budget_in_bytes_counts_every_byte_of_experts_towers_and_drafts(
    tmp_path: Path, finished_seeing: Config, share: float
) -> None:
    smallest, largest = bounds(finished_seeing)
    budget = smallest + int(share * (largest - smallest))
    config = finished_seeing.model_copy(
        update={
            "budget": finished_seeing.budget.model_copy(update={"bpp": None, "bytes": budget}),
            "store": finished_seeing.store.model_copy(update={"output": tmp_path / "bytes"}),
        }
    )
    assemble.run(config)
    assert verify.run(config).ok
    total = sum(path.stat().st_size for path in config.store.output.iterdir())
    assert total <= budget


def bounds(config: Config) -> tuple[int, int]:
    """Smallest and largest repository, read from the refusal of an impossible budget."""
    impossible = config.budget.model_copy(update={"bpp": None, "bytes": 1})
    with pytest.raises(InputError, match="below the smallest plan") as caught:
        Run(config).sizes.limit(impossible)
    words = str(caught.value).split()
    return int(words[-4]), int(words[-2])


def test_fisher_trace_chooses_by_another_price(finished: Config) -> None:
    other = finished.model_copy(
        update={"allocation": finished.allocation.model_copy(update={"objective": "fisher_trace"})}
    )
    by_token, by_trace = (Run(config).measured().planner.problem(config.budget).cost for config in (finished, other))
    assert by_token.shape == by_trace.shape
    assert (by_trace[:, :-1] > 0).all()
    assert not np.allclose(by_token, by_trace)


def test_boundaries_are_gone_when_they_are_not_needed(finished: Config) -> None:
    assert not [path for path in finished.store.run.rglob("*") if path.name.startswith("boundary-")]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("calibration.seed=1", "calibration.seed"),
        ("calibration.sequences=6", "calibration.sequences"),
        ("formats=[NVFP4, BF16]", "formats"),
        ("rounding.gptq=null", "rounding"),
        ("cluster.threads=2", "cluster.threads"),
        ("calibration.labels=data", "calibration.labels"),
    ],
)
def test_another_run_in_the_store_is_refused_by_name(finished: Config, override: str, key: str) -> None:
    path = finished.store.run.parent / "config.yaml"
    config = load_config(path, [f"formats=[{','.join(ALL_FORMATS)}]", override])
    with pytest.raises(InputError, match=f"another {key}"):
        _ = Run(config).store


def test_a_changed_model_is_refused(tmp_path: Path, source: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    config = configuration(tmp_path, copy)
    _ = Run(config).store
    file = next(copy.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="another model"):
        _ = Run(config).store


# Bad input: one clear line, before anything expensive, nothing half written ---------------------------------------


def refused(config: Config, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run = Run(config, open_workers=unopened)
        run.check()
        run.measure()
    assert "\n" not in str(caught.value)
    assert not config.store.output.exists() or (config.store.output / "mine.txt").exists()


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    refused(configuration(tmp_path, tmp_path / "nowhere"), "neither a directory nor in the hub's cache")
    refused(configuration(tmp_path, Path("some-org/some-model")), "hf download some-org/some-model")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", "llama")
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(configuration(tmp_path, checkpoint), "cut short")


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", "llama")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(configuration(tmp_path, checkpoint), r"layers\.1\.mlp\.up_proj\.weight is missing")


def test_a_nan_weight_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", "llama")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(configuration(tmp_path, checkpoint), r"up_proj\.weight holds 1 NaN")


def test_too_little_text_is_refused(tmp_path: Path, source: Path) -> None:
    refused(configuration(tmp_path, source, "calibration.sequences=5000"), "5,000 sequences")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.bpp=3", r"below the smallest plan; give one between 4\.5000 and 16\.0000"),
        ("budget.bpp=17", r"above the largest plan; give one between 4\.5000 and 16\.0000"),
        ("budget.bytes=1kB", "below the smallest plan"),
        ("budget.bytes=1GB", "above the largest plan"),
    ],
)
def test_an_impossible_budget_is_refused_with_both_bounds(
    tmp_path: Path, source: Path, override: str, message: str
) -> None:
    refused(configuration(tmp_path, source, override), message)


def test_formats_that_fit_nowhere_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", "llama", hidden=72, intermediate=144, heads=4, kv_heads=2, head_dim=18)
    refused(configuration(tmp_path, checkpoint, "formats=[NVFP4]"), "can take none of NVFP4")
    for name in ("INT3A16", "INT4", "INT4A8", "MXFP4A8", "INT6A16", "INT8A16", "FP8_BLOCK"):
        config = configuration(tmp_path, checkpoint, f"formats=[{name}, FP8]")
        refused(config, rf"no Linear can take {name} \(in_features 72 is not a multiple of")
        assert not config.store.run.exists()


def test_an_output_that_holds_something_else_is_refused(tmp_path: Path, source: Path) -> None:
    config = configuration(tmp_path, source)
    config.store.output.mkdir()
    (config.store.output / "mine.txt").write_text("keep")
    refused(config, "holds something else")
    assert (config.store.output / "mine.txt").read_text() == "keep"


def test_not_enough_memory_or_disk_is_refused_with_figures(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    config = configuration(tmp_path, source)
    with monkeypatch.context() as patched:
        patched.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**6))
        refused(
            config, r"not enough memory: each of 1 workers needs \d\.\d\d GB of memory, \d\.\d\d GB are free .*Hessians"
        )
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**3))
        refused(config, r"not enough disk .*run store \d\.\d\d GB")


def test_a_hub_id_is_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are links into a folder of blobs, as huggingface_hub lays them out."""
    checkpoint = make_checkpoint(tmp_path / "m", "qwen2")
    repository = tmp_path / "cache" / "models--some-org--some-model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = configuration(tmp_path, Path("some-org/some-model"))
    quantized(config)
    assert verify.run(config).ok
    names = {path.name for path in config.store.output.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert not any(path.is_symlink() for path in config.store.output.iterdir())


@pytest.mark.parametrize(
    ("setting", "device", "there", "decided"),
    [
        ("auto", "cpu", True, "float32"),
        ("auto", "gpu", False, "bfloat16"),
        ("auto", "auto", True, "bfloat16"),
        ("auto", "auto", False, "float32"),
        ("float32", "gpu", True, "float32"),
        ("bfloat16", "cpu", False, "bfloat16"),
    ],
)
def test_the_dtype_is_decided_when_a_run_begins_and_recorded(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, setting: str, device: str, there: bool, decided: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    config = configuration(tmp_path, source, f"model.dtype={setting}", f"cluster.device={device}")
    run = Run(config)
    record = from_bytes(RunRecord, run.store.get(RUN))
    assert run.config.model.dtype == decided
    assert record.fingerprint["model.dtype"] == decided


def test_blocks_computed_in_bfloat16_price_about_the_same(tmp_path: Path, source: Path) -> None:
    tables = []
    for dtype in ("float32", "bfloat16"):
        config = configuration(tmp_path / dtype, source, f"model.dtype={dtype}")
        quantized(config)
        assert verify.run(config).ok
        tables.append(Run(config).measured().planner.table.token_fisher[:, :2])
    ratio = np.log(tables[1] / tables[0])
    # BF16 has three digits, and other labels are sampled where the prediction differs; 256 tokens average little.
    assert abs(np.median(ratio)) < 0.15
    assert np.abs(ratio).max() < 1.0
