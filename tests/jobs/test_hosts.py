"""Ray's head, two workers' nodes, a driver and an S3 server on hosts of their own, with networks that are disturbed.

Every scenario ends in the bytes of an undisturbed run or, where that cannot be, in a stated line after which the same
command does. Time, silence and repeated steps are printed at the end of the test run; docs/operations.md has them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prismaquant_ray.storage.store import Store
from tests.hosts import DRIVER, ONE, STORE, TWO, Driven, Host, Hosts, wrong_clock
from tests.observed import ObservedRun, Record, Scenery, Size, stored_digests
from tests.s3_server import environment
from tests.tiny import make_checkpoint, make_text

pytestmark = [pytest.mark.faults, pytest.mark.s3]
# A microbatch's boundary has 256 KiB: Ray would send less than 100 KB through the driver instead of between nodes.
SIZE = Size(layers=6, sequences=64, length=128, microbatch=4, blocks_per_shard=1)
MICROBATCHES = SIZE.microbatches
# Seconds after which a driver has said something again, whatever happens: fifteen, and what a busy machine adds.
SILENT = 20.0


@dataclass
class Site:
    """What the scenarios share."""

    hosts: Hosts
    scenery: Scenery
    expected: dict[str, str] = field(default_factory=dict)


class Scene(ObservedRun):
    """One run on the hosts."""

    def __init__(self, site: Site, directory: Path, name: str, record: Record = lambda *_: None) -> None:
        super().__init__(site.scenery, directory, name, record)
        self.hosts, self.expected = site.hosts, site.expected

    def start(self, **variables: str) -> Driven:
        self.driver = self.hosts.drive(["quantize", self.config], **variables)
        return self.driver

    def reached(self, stage: str, kind: str, **variables: str) -> Driven:
        """A new run, at a step of this kind on the first worker's host."""
        driver = self.start(**variables)
        driver.until(lambda: self.hosts.hosts[ONE].doing(stage, kind))
        return driver

    def lost(self) -> dict[str, str]:
        """The hosts whose workers were lost, and why."""
        hosts = {worker["worker"]: worker["host"] for worker in self.events("worker")}
        return {hosts.get(lost["worker"], lost["worker"]): lost["cause"] for lost in self.events("lost")}

    def figures(self) -> str:
        return f"{self.driver.seconds:>4.0f} s, silent for {self.driver.silence:>2.0f} s, "

    def is_right(self, at_most: int) -> None:
        """As undisturbed, and never silent for long."""
        assert self.driver.silence < SILENT, self.driver.err
        self.is_same(self.expected, self.repeated(), at_most)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("hosts")
    checkpoint = make_checkpoint(directory / "source", "qwen3", layers=SIZE.layers, hidden=128, intermediate=320)
    text = make_text(directory, 60_000)
    with pytest.MonkeyPatch.context() as patch, Hosts() as hosts:
        hosts.server.make_bucket("hosts")
        for key, value in environment(hosts.server.endpoint).items():
            patch.setenv(key, value)
        source = Store("s3://hosts/model")
        for path in checkpoint.iterdir():
            source.put(path.name, path.read_bytes())
        site = Site(hosts, Scenery(bucket="s3://hosts", size=SIZE, source="s3://hosts/model", text=text))
        scene = Scene(site, directory, "undisturbed")
        driver = scene.start()
        driver.end()
        assert scene.repeated() == 0
        site.expected = stored_digests(scene.output)
        yield site


@pytest.fixture
def scene(site: Site, tmp_path: Path, request: pytest.FixtureRequest, record_property: Record) -> Iterator[Scene]:
    name = request.node.name.removeprefix("test_").replace("[", "-").replace("]", "")
    site.hosts.restore()
    yield Scene(site, tmp_path, name, record_property)


def test_a_machine_that_gives_no_hosts_is_no_reason_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(AssertionError, match="this machine gives none: unshare failed: Operation not permitted"):
        Host("alone", 2, tmp_path)


def test_worker_cut_off_for_good(scene: Scene) -> None:
    driver = scene.reached("backward", "run")
    scene.hosts.cut(ONE)
    driver.end()
    assert scene.lost() == {ONE: "its node is gone"}
    scene.is_right(2 * MICROBATCHES)


def test_worker_that_can_send_but_gets_nothing(scene: Scene) -> None:
    driver = scene.reached("backward", "run")
    scene.hosts.deafen(ONE)
    driver.end()
    assert scene.lost() == {ONE: "its node is gone"}
    scene.is_right(2 * MICROBATCHES)


def test_workers_cut_off_from_each_other(scene: Scene) -> None:
    driver = scene.reached("forward", "run")
    scene.hosts.cut(ONE, TWO)
    driver.end()
    assert scene.lost() == {}
    assert "cannot fetch what worker-" in driver.err
    scene.is_right(0)


def test_storage_cut_off_from_one_worker(scene: Scene) -> None:
    driver = scene.reached("backward", "run")
    scene.hosts.cut(ONE, STORE)
    driver.end()
    # Another worker may be started there, and lost in the same way.
    assert scene.lost().items() >= {ONE: "it cannot reach storage"}.items()
    assert re.search(rf"lost worker-\d on {ONE}: it cannot reach storage", driver.err)
    scene.is_right(2 * MICROBATCHES)


def test_driver_cut_off_and_continued(scene: Scene) -> None:
    driver = scene.reached("backward", "run")
    scene.hosts.cut(DRIVER)
    driver.until(lambda: DRIVER not in scene.hosts.alive())
    scene.hosts.heal()
    driver.end(3)
    assert driver.said[-1][1].startswith(f"error: the driver's own Ray node, {DRIVER}, is lost to the cluster")
    assert not scene.store.list("lease"), "the next driver need not wait"
    orphans = scene.orphans()
    scene.hosts.restore()
    driver = scene.start()
    driver.end()
    scene.is_right(2 * MICROBATCHES)
    assert orphans <= 2 * MICROBATCHES


def test_worker_frozen_and_woken(scene: Scene) -> None:
    driver = scene.reached("backward", "run")
    scene.hosts.freeze(ONE)
    driver.until(lambda: ONE not in scene.hosts.alive())
    scene.hosts.wake(ONE)
    driver.end()
    assert scene.lost() == {ONE: "its node is gone"}
    scene.is_right(2 * MICROBATCHES)


def test_worker_cut_off_and_healed_before_it_is_missed(scene: Scene) -> None:
    driver = scene.reached("backward", "run")
    before = scene.hosts.network.dropped
    scene.hosts.cut(ONE)
    time.sleep(2)
    assert scene.hosts.network.dropped > before
    scene.hosts.heal()
    driver.end()
    assert scene.lost() == {}
    scene.is_right(0)


def test_packets_lost_and_late_and_clocks_that_differ_by_minutes(scene: Scene, tmp_path: Path) -> None:
    scene.hosts.leave(ONE)
    scene.hosts.restore(**wrong_clock(tmp_path, 7 * 60))
    driver = scene.reached("forward", "run", **wrong_clock(tmp_path, -7 * 60))
    before = scene.hosts.network.dropped
    scene.hosts.network.losing, scene.hosts.network.delay = 0.2, 0.05
    time.sleep(20)
    assert scene.hosts.network.dropped > before + 100
    scene.hosts.heal()
    driver.end()
    begun = [work.started for work in scene.work()]
    assert max(begun) - min(begun) > 6 * 60, "no worker had the wrong clock"
    assert scene.lost() == {}
    scene.is_right(0)
    # The next test finds its clock right.
    scene.hosts.leave(ONE)
