"""Claims about the lease: one driver at a time, nobody waits for the dead longer than needed."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from prismaquant_ray.errors import ResourceError, StoreError
from prismaquant_ray.storage import lease
from prismaquant_ray.storage.lease import Holder, held, holder
from prismaquant_ray.storage.store import Store


class Clock:
    """Time passes when somebody sleeps; `meanwhile` is what others do then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[float], None] = lambda _: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self.now)

    def read(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def elsewhere(store: Store, **changes: object) -> Holder:
    """A lease of a driver on another machine."""
    other = Holder(id="other", host="elsewhere", pid=7, process_started=1.0, boot="another boot")
    other = replace(other, **changes)  # type: ignore[arg-type]
    store.put("lease/00000003.json", json.dumps(asdict(other)).encode())
    return other


def test_a_released_lease_leaves_nothing_behind(store: Store) -> None:
    with held(store):
        assert len(store.list("lease")) == 1
        found = holder(store)
        assert found is not None
        assert not found.is_gone
    assert store.list() == []
    assert holder(store) is None


def test_what_ended_a_run_is_said_also_where_its_lease_cannot_be_released(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: list[str]) -> None:
        raise StoreError("read-only")

    with pytest.raises(ResourceError, match="no worker is left"), held(store):
        monkeypatch.setattr(store, "delete", refused)
        raise ResourceError("no worker is left")
    monkeypatch.undo()
    # Nothing else goes wrong: then it is the lease that counts.
    store.delete(store.list("lease"))
    with pytest.raises(StoreError, match="read-only"), held(store):
        monkeypatch.setattr(store, "delete", refused)


def test_a_second_driver_is_refused_while_the_first_renews(store: Store) -> None:
    with held(store, renewal=0.05) as first:
        with pytest.raises(ResourceError, match="another driver is on this run"), held(store, ttl=5.0):
            pass
        first.check()


def test_a_lease_nobody_renews_expires_by_the_watchers_clock(store: Store) -> None:
    elsewhere(store)
    clock = Clock()
    with held(store, ttl=30.0, sleep=clock.sleep, clock=clock.read):
        assert clock.now >= 30.0
        assert [Path(key).stem for key in store.list("lease")] == ["00000004"]


def test_a_lease_that_is_renewed_while_it_is_watched_is_respected(store: Store) -> None:
    other = elsewhere(store)
    clock = Clock()

    def renew(now: float) -> None:
        elsewhere(store, renewals=other.renewals + int(now // 5))

    clock.meanwhile = renew
    with (
        pytest.raises(ResourceError, match="process 7 on elsewhere"),
        held(store, ttl=30.0, sleep=clock.sleep, clock=clock.read),
    ):
        pass
    assert clock.now < 10


def test_a_dead_process_of_this_machine_is_not_waited_for(store: Store) -> None:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    assert process.pid is not None
    import psutil

    mine = holder_of(process.pid, psutil.Process(process.pid).create_time())
    store.put("lease/00000000.json", json.dumps(asdict(mine)).encode())
    assert not mine.is_gone
    process.kill()
    process.join()
    assert mine.is_gone
    clock = Clock()
    with held(store, sleep=clock.sleep, clock=clock.read):
        assert clock.now == 0.0
    # A process that has the same number now is another one.
    assert holder_of(1, 0.0).is_gone


def holder_of(pid: int, started: float) -> Holder:
    return Holder(id="mine", host="here", pid=pid, process_started=started, boot=lease._boot())


def test_who_was_taken_over_learns_it_and_does_not_delete_the_others_lease(store: Store) -> None:
    with held(store, renewal=0.02) as first:
        other = Holder(id="other", host="elsewhere", pid=7, process_started=1.0, boot="another boot")
        store.put("lease/00000009.json", json.dumps(asdict(other)).encode())
        deadline = time.monotonic() + 10
        with pytest.raises(ResourceError, match="taken this run over"):
            while time.monotonic() < deadline:
                first.check()
    assert "lease/00000009.json" in store.list("lease")


@pytest.mark.slow
def test_of_many_drivers_that_wait_for_the_dead_one_wins(store: Store) -> None:
    elsewhere(store)
    with held(store, ttl=0.2) as first:
        first.check()
        with pytest.raises(ResourceError, match="another driver"), held(store, ttl=20.0):
            pass
