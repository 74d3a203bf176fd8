"""One driver per run store: a lease that its holder renews and that expires when it stops.

The store needs *create if absent* only. Each lease is one numbered object; the creator of the next number holds
the run. Clocks of different machines are never compared: a lease has expired when it has not been rewritten for `TTL`
seconds of the watcher's own clock, or at once when its holder was a process of this machine that is gone.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from prismaquant_ray.errors import ResourceError, StoreError
from prismaquant_ray.interruption import uninterrupted
from prismaquant_ray.parsing import MAX_BYTES
from prismaquant_ray.serialization import from_bytes
from prismaquant_ray.storage.store import Store

#: Seconds after which a lease that is not renewed may be taken over, and between two renewals.
TTL = 30.0
RENEWAL = 5.0
#: Where leases are.
LEASES = "lease"


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The holder of a lease. `boot` distinguishes machines, and boots of one machine, that share a name."""

    id: str
    host: str
    pid: int
    process_started: float
    boot: str
    renewals: int = 0

    @property
    def is_gone(self) -> bool:
        """Whether it is certainly dead: a process of this boot of this machine that no longer runs."""
        if self.boot != _boot():
            return False
        try:
            return psutil.Process(self.pid).create_time() != self.process_started
        except psutil.NoSuchProcess:
            return True


class Lease:
    """A held lease; `check` raises when another driver has taken the run over."""

    def __init__(self, store: Store, number: int, holder: Holder, renewal: float) -> None:
        self._store = store
        self._number = number
        self._holder = holder
        self._renewal = renewal
        self._stop = threading.Event()
        self._failure: StoreError | ResourceError | None = None
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """ResourceError when the lease was taken over, StoreError when it cannot be renewed."""
        if self._failure is not None:
            raise self._failure

    @uninterrupted
    def release(self) -> None:
        """Release the run for the next driver."""
        self._stop.set()
        self._thread.join()
        if self._failure is None:
            self._store.delete([_key(self._number)])

    def _renew(self) -> None:
        renewals = 0
        while not self._stop.wait(self._renewal):
            renewals += 1
            try:
                found = _read(self._store, self._number)
                if _newest(self._store) != self._number or found is None or found.id != self._holder.id:
                    self._failure = ResourceError(
                        f"{self._store.uri}: another driver has taken this run over; it continues there"
                    )
                    return
                body = asdict(self._holder) | {"renewals": renewals}
                self._store.put(_key(self._number), json.dumps(body).encode())
            except StoreError as error:
                self._failure = error
                return


@contextmanager
def held(
    store: Store,
    *,
    ttl: float = TTL,
    renewal: float = RENEWAL,
    notice: Callable[[Holder], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Lease]:
    """Hold the run inside the with-block; ResourceError when a living driver holds it.

    A lease found here is watched: renewed within `ttl` seconds, its driver lives; else it is taken over. `notice`
    is called with the holder that is waited for.
    """
    me = Holder(
        id=uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
        boot=_boot(),
    )
    lease = _claim(store, me, renewal, _Watch(ttl=ttl, notice=notice, sleep=sleep, clock=clock))
    try:
        yield lease
    except BaseException:
        # What ended the run says more than that its store cannot be written either: the lease expires by itself then.
        with suppress(StoreError):
            lease.release()
        raise
    lease.release()


def holder(store: Store) -> Holder | None:
    """The last holder that did not release the run, dead or alive."""
    number = _newest(store)
    return None if number is None else _read(store, number)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Watch:
    """How to wait for the lease of another driver."""

    ttl: float
    notice: Callable[[Holder], None]
    sleep: Callable[[float], None]
    clock: Callable[[], float]


def _claim(store: Store, me: Holder, renewal: float, watch: _Watch) -> Lease:
    while True:
        number = _newest(store)
        if number is not None:
            _wait_until_expired(store, number, watch)
        lease = _take(store, number, me, renewal)
        if lease is not None:
            return lease


@uninterrupted
def _take(store: Store, expired: int | None, me: Holder, renewal: float) -> Lease | None:
    """The lease that follows the expired one; None if another driver has it."""
    number = 0 if expired is None else expired + 1
    if not store.create(_key(number), json.dumps(asdict(me)).encode()):
        return None
    if expired is not None:
        store.delete([_key(expired)])
    return Lease(store, number, me, renewal)


def _wait_until_expired(store: Store, number: int, watch: _Watch) -> None:
    first = _read(store, number)
    if first is not None and not first.is_gone:
        watch.notice(first)
    since = watch.clock()
    while True:
        now = _read(store, number)
        if now is None or now.is_gone:
            return
        if first is not None and now != first:
            raise ResourceError(
                f"{store.uri}: another driver is on this run (process {now.pid} on {now.host}); wait for it or stop it"
            )
        if watch.clock() - since >= watch.ttl:
            return
        watch.sleep(min(1.0, watch.ttl / 10))


def _newest(store: Store) -> int | None:
    numbers = [int(Path(key).stem) for key in store.list(LEASES) if re.fullmatch(r"\d{8}\.json", Path(key).name)]
    return max(numbers, default=None)


def _read(store: Store, number: int) -> Holder | None:
    try:
        return from_bytes(Holder, store.get(_key(number), MAX_BYTES))
    except (KeyError, ValueError):
        # Released meanwhile, or not a lease.
        return None


def _key(number: int) -> str:
    return f"{LEASES}/{number:08d}.json"


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    boot = path.read_text().strip() if path.exists() else str(psutil.boot_time())
    # Containers share their machine's boot but not its processes.
    namespace = Path("/proc/self/ns/pid")
    return f"{boot}/{namespace.readlink()}" if namespace.exists() else boot
