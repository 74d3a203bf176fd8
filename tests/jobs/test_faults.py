"""A real cluster of three Ray nodes on a real S3 server, and everything that dies on rented machines.

Every scenario ends in the same bytes as an undisturbed run, and repeats at most one shard for each worker that was
lost. What was repeated is printed at the end of the test run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prismaquant_ray.storage.store import Store
from tests.fault_proxy import FaultProxy
from tests.observed import ObservedRun, Record, Scenery, Size, stored_digests
from tests.ray_cluster import RayCluster, start_driver
from tests.s3_server import S3Server, environment
from tests.tiny import make_checkpoint, make_text
from tests.waiting import PATIENCE, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.s3]
SIZE = Size(layers=6, sequences=8, length=32, microbatch=2, blocks_per_shard=2)
MICROBATCHES, STEPS = SIZE.microbatches, SIZE.steps


@dataclass
class Site:
    """What the scenarios share."""

    server: S3Server
    proxy: FaultProxy
    cluster: RayCluster
    environment: dict[str, str]
    scenery: Scenery
    output: str = ""
    expected: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


class Scene(ObservedRun):
    """One run on the site."""

    def __init__(self, site: Site, directory: Path, name: str, record: Record = lambda *_: None) -> None:
        super().__init__(site.scenery, directory, name, record)
        self.site = site

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return start_driver(["quantize", self.config], self.site.cluster.address, self.site.environment, *overrides)

    def start_evaluation(self) -> subprocess.Popen[str]:
        """Of the undisturbed repository, with all that it needs in the store."""
        text = ["--text", self.scenery.text, "--sequences", str(SIZE.sequences), "--length", str(SIZE.length)]
        command = ["evaluate", self.site.output, "--source", self.scenery.source, *text, "--store", self.run_uri]
        settings = (f"calibration.microbatch={SIZE.microbatch}", f"cluster.blocks_per_shard={SIZE.blocks_per_shard}")
        address, environment = self.site.cluster.address, self.site.environment
        return start_driver(command, address, environment, "cluster.device=cpu", *settings)

    def end(self, driver: subprocess.Popen[str]) -> dict[str, Any]:
        out, err = driver.communicate(timeout=PATIENCE)
        assert driver.returncode == 0, err
        result: dict[str, Any] = json.loads(out)
        return result

    def is_right(self, repeated: int, at_most: int, harmed: Sequence[str] = ()) -> None:
        self.is_same(self.site.expected, repeated, at_most, harmed)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("faults")
    checkpoint = make_checkpoint(directory / "source", "qwen3", layers=SIZE.layers)
    with S3Server() as server, FaultProxy("127.0.0.1", server.port) as proxy:
        server.make_bucket("faults")
        patch = pytest.MonkeyPatch()
        for key, value in environment(server.endpoint).items():
            patch.setenv(key, value)
        source = Store("s3://faults/model")
        for path in checkpoint.iterdir():
            source.put(path.name, path.read_bytes())
        through = environment(proxy.endpoint)
        with RayCluster(2, through) as cluster:
            # RayCluster's environment is the nodes'; this process itself goes to the server directly.
            for key, value in environment(server.endpoint).items():
                patch.setenv(key, value)
            text = make_text(directory, 6000)
            scenery = Scenery(bucket="s3://faults", size=SIZE, source="s3://faults/model", text=text)
            site = Site(server, proxy, cluster, through, scenery)
            scene = Scene(site, directory, "undisturbed")
            scene.end(scene.start())
            assert scene.repeated() == 0
            site.output = scene.output
            site.expected = stored_digests(scene.output)
            site.figures = Scene(site, directory, "evaluated").end(scene.start_evaluation())
            assert 0 < site.figures["weights"]["kl_mean"] < site.figures["activations"]["kl_mean"]
            yield site
        patch.undo()


@pytest.fixture
def scene(site: Site, tmp_path: Path, request: pytest.FixtureRequest, record_property: Record) -> Iterator[Scene]:
    name = request.node.name.removeprefix("test_").replace("[", "-").replace("]", "")
    site.cluster.restore()
    yield Scene(site, tmp_path, name, record_property)
    site.proxy.clear()


MOMENTS = [("forward", "run"), ("forward", "finish"), ("backward", "run"), ("backward", "finish")]


@pytest.mark.parametrize(("stage", "kind"), MOMENTS)
def test_worker_killed(scene: Scene, stage: str, kind: str) -> None:
    driver = scene.start()
    os.kill(scene.site.cluster.worker(stage, kind, driver), signal.SIGKILL)
    scene.end(driver)
    assert [lost["cause"] for lost in scene.events("lost")] == ["its process died"]
    scene.is_right(scene.repeated(), MICROBATCHES)


def test_both_workers_killed_at_once(scene: Scene) -> None:
    driver = scene.start()
    scene.site.cluster.worker("backward", "run", driver)
    pids = [worker["pid"] for worker in wait_for(lambda: _two(scene.events("worker")), driver)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    scene.end(driver)
    assert len(scene.events("lost")) == 2
    scene.is_right(scene.repeated(), 2 * MICROBATCHES)


def _two(workers: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    return workers if len(workers) == 2 else None


@pytest.mark.parametrize(("stage", "kind"), MOMENTS)
def test_node_removed(scene: Scene, stage: str, kind: str) -> None:
    driver = scene.start()
    scene.site.cluster.remove_node_of(scene.site.cluster.worker(stage, kind, driver))
    scene.end(driver)
    assert len(scene.events("lost")) >= 1
    # One worker is left; it may have to give up its own shard for the lost one.
    scene.is_right(scene.repeated(), 2 * MICROBATCHES)


def test_node_removed_and_another_comes(scene: Scene) -> None:
    driver = scene.start()
    scene.site.cluster.remove_node_of(scene.site.cluster.worker("forward", "run", driver))
    scene.site.cluster.restore()
    scene.end(driver)
    assert len(scene.events("worker")) >= 2
    scene.is_right(scene.repeated(), 2 * MICROBATCHES)


@pytest.mark.parametrize(
    ("stage", "kind", "then"),
    [
        ("forward", "run", "cluster.workers=1"),
        ("forward", "finish", "cluster.blocks_per_shard=1"),
        ("backward", "run", "cluster.blocks_per_shard=3"),
        ("backward", "finish", "cluster.workers=2"),
    ],
)
def test_driver_killed(scene: Scene, stage: str, kind: str, then: str) -> None:
    driver = scene.start()
    scene.site.cluster.worker(stage, kind, driver)
    driver.kill()
    driver.communicate()
    scene.site.cluster.wait_until_idle()
    recorded, orphans = scene.records(), scene.orphans()
    driver = scene.start(then)
    scene.end(driver)
    assert {key: scene.records()[key] for key in recorded} == recorded, "finished work was done again"
    scene.is_right(orphans, 2 * MICROBATCHES)


def test_driver_killed_before_the_first_step(scene: Scene) -> None:
    driver = scene.start()
    wait_for(lambda: scene.store.size("run.json"), driver)
    driver.kill()
    driver.communicate()
    scene.end(scene.start())
    scene.is_right(scene.repeated(), 0)


def test_driver_killed_while_it_assembles(scene: Scene) -> None:
    scene.site.proxy.latency = 0.03
    driver = scene.start()
    output = Store(scene.output)
    wait_for(lambda: output.size("prismaquant.json"), driver)
    driver.kill()
    driver.communicate()
    assert output.size("config.json") is None, "readers must not see a model yet"
    scene.site.proxy.latency = 0.0
    scene.end(scene.start())
    scene.is_right(scene.repeated(), 0)


def test_driver_stopped_by_sigterm(scene: Scene) -> None:
    driver = scene.start()
    scene.site.cluster.worker("backward", "run", driver)
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 143
    assert err.splitlines()[-1] == "stopped; the same command continues"
    assert scene.events("end")[-1] == {"how": "stopped"}
    assert not scene.store.list("lease"), "the next driver need not wait"
    before, orphans = scene.steps(), scene.orphans()
    scene.end(scene.start())
    assert scene.steps() > before
    scene.is_right(orphans, 2 * MICROBATCHES)


@pytest.mark.parametrize(("stage", "kind"), [("forward", "finish"), ("backward", "run")])
def test_storage_killed_for_20_seconds(scene: Scene, stage: str, kind: str) -> None:
    driver = scene.start()
    scene.site.cluster.worker(stage, kind, driver)
    _outage(scene.site.server)
    scene.end(driver)
    scene.is_right(scene.repeated(), 0)


def test_storage_killed_for_20_seconds_while_the_repository_is_written(scene: Scene) -> None:
    scene.site.proxy.latency = 0.03
    driver = scene.start()
    output = Store(scene.output)
    wait_for(lambda: output.size("prismaquant.json"), driver)
    _outage(scene.site.server)
    scene.end(driver)
    scene.is_right(scene.repeated(), 0)


def _outage(server: S3Server) -> None:
    server.kill()
    time.sleep(20)
    server.restart()


def test_storage_answers_slow_down(scene: Scene) -> None:
    scene.site.proxy.slow_down = 0.3
    scene.end(scene.start())
    assert scene.site.proxy.refused > 20
    scene.is_right(scene.repeated(), 0)


def test_storage_cuts_connections(scene: Scene) -> None:
    scene.site.proxy.breaking = 0.3
    scene.end(scene.start())
    assert scene.site.proxy.cuts > 20
    scene.is_right(scene.repeated(), 0)


def harmed(store: Store, key: str, harm: str) -> None:
    data = bytearray(store.get(key))
    if harm == "cut":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 0x40
    store.put(key, bytes(data))


def first(store: Store, ending: str) -> Callable[[], str | None]:
    prefix, _, name = ending.partition("*")
    return lambda: next((key for key in store.list(prefix.rstrip("/")) if key.endswith(name)), None)


@pytest.mark.parametrize(
    ("key", "harm"),
    [("forward/0003/*/NVFP4.safetensors", "flip"), ("forward/0001/*/boundary-00002.safetensors", "cut")],
)
def test_object_damaged_during_the_run(scene: Scene, key: str, harm: str) -> None:
    driver = scene.start()
    victim = wait_for(first(scene.store, key), driver)
    wait_for(lambda: scene.store.size(key.partition("*")[0] + "record.json"), driver)
    harmed(scene.store, victim, harm)
    scene.end(driver)
    # Repairing a boundary runs the forward pass up to it again, and the steps under way in the backward pass are lost.
    scene.is_right(scene.repeated(), STEPS // 2 + 2 * MICROBATCHES, [victim])


@pytest.mark.parametrize(
    ("key", "harm"),
    [
        ("forward/0000/*/MXFP8.safetensors", "flip"),
        ("forward/0002/*/factors.safetensors", "flip"),
        ("forward/0005/*record.json", "cut"),
        ("backward/0002/*record.json", "cut"),
    ],
)
def test_object_damaged_between_two_runs(scene: Scene, key: str, harm: str) -> None:
    driver = scene.start()
    wait_for(lambda: scene.store.size("measured.json"), driver)
    driver.kill()
    driver.communicate()
    victim = first(scene.store, key)()
    assert victim is not None
    harmed(scene.store, victim, harm)
    scene.end(scene.start())
    scene.is_right(scene.repeated(), STEPS, [victim])


def test_worker_killed_in_an_evaluation(scene: Scene) -> None:
    driver = scene.start_evaluation()
    os.kill(scene.site.cluster.worker("evaluation", "run", driver), signal.SIGKILL)
    assert scene.end(driver) == scene.site.figures
    assert [lost["cause"] for lost in scene.events("lost")] == ["its process died"]


def test_node_removed_in_an_evaluation(scene: Scene) -> None:
    driver = scene.start_evaluation()
    scene.site.cluster.remove_node_of(scene.site.cluster.worker("evaluation", "run", driver))
    assert scene.end(driver) == scene.site.figures
    assert len(scene.events("lost")) >= 1


def test_driver_killed_in_an_evaluation(scene: Scene) -> None:
    driver = scene.start_evaluation()
    place = "evaluations/running"
    done = wait_for(lambda: [key for key in scene.store.list(place) if key.endswith("boundary.json")], driver)
    driver.kill()
    driver.communicate()
    scene.site.cluster.wait_until_idle()
    assert scene.end(scene.start_evaluation()) == scene.site.figures
    assert done
    # What is recorded is not run again; a killed driver may have said of its steps, or not.
    begun = [work.shard for work in scene.work()]
    assert begun.count("entry") <= 1
    assert not scene.store.list(place), "what it needed in between is gone"
