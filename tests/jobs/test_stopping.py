"""A command is stopped by signals at any moment of any stage: it ends in order and leaves nothing behind.

Every try is a process of its own: quantize with a Ray of its own, assemble on a copy of a finished run, or publish to a
real S3 server.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jobs.commands import status
from jobs.stopping import STOPPED
from prismaquant_ray.storage.lease import held
from prismaquant_ray.storage.store import Store
from tests.fault_proxy import FaultProxy
from tests.runs import configuration, digests, quantized
from tests.s3_server import S3Server, environment
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
#: Where the process of a command is, in this order; quantize assembles and verifies at the end of measuring.
STAGES = {
    "quantize": ("starting", "measuring"),
    "assemble": ("importing", "assembling", "verifying", "ending"),
    "publish": ("publishing",),
}
COMMAND_OF = {stage: command for command, stages in STAGES.items() for stage in stages}
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
TRIES, AT_ONCE = 100, 4


@dataclass(frozen=True)
class Try:
    """When to send which signals: a share of the stage's usual time after its beginning, then seconds between them."""

    stage: str
    share: float
    signals: tuple[signal.Signals, ...]
    pause: float


@dataclass
class Site:
    """What the tries share: a finished run, an S3 server behind a slow proxy, and seconds of every stage."""

    directory: Path
    source: Path
    proxy: FaultProxy
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> Path:
        return self.directory / "finished"


class Job:
    """A process with its own directories, and a mark in its environment that everything it starts inherits."""

    def __init__(self, site: Site, command: str) -> None:
        self.site = site
        self.command = command
        self.mark = uuid4().hex
        self.directory = site.directory / self.mark
        self.temporary = self.directory / "temporary"
        self.temporary.mkdir(parents=True)
        configuration(self.directory, site.source)
        self.run, self.output = self.directory / "run", self.directory / "repository"
        self.target = f"s3://stopping/{self.mark}"
        if command == "assemble":
            shutil.copytree(site.finished / "run", self.run)
        repository = str(site.finished / "repository")
        configured = [str(self.directory / "config.yaml"), "--set", "cluster.wait=600"]
        arguments = [repository, self.target] if command == "publish" else configured
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        mine = {"TMPDIR": str(self.temporary), "MARK": self.mark, **environment(site.proxy.endpoint)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs", command, *arguments],
            cwd=ROOT, env={**clean, **mine}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def reached(self, stage: str) -> bool:
        """Whether the process is in this stage, or further."""
        staged = [*self.directory.glob(".repository.writing-*")]
        is_there = {
            "starting": self._owns_signals,
            "importing": self._owns_signals,
            "measuring": lambda: any(self.run.glob("forward/*/*")),
            "assembling": lambda: staged or self.output.exists(),
            "verifying": lambda: any((path / "config.json").exists() for path in staged) or self.output.exists(),
            "ending": self.output.exists,
            "publishing": lambda: Store(self.target).list(),
        }
        return bool(is_there[stage]()) or self.process.poll() is not None

    def _owns_signals(self) -> bool:
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except FileNotFoundError:
            return False
        blocked = next((line for line in lines if line.startswith("SigBlk")), "SigBlk: 0")
        return bool(int(blocked.split()[1], 16) & 1 << signal.SIGTERM - 1)

    def left(self) -> list[str]:
        """Processes that inherited the mark and still run."""
        return [
            f"{process.pid} {process.info['cmdline'][:3]}"
            for process in psutil.process_iter(["environ", "cmdline", "status"])
            if (process.info["environ"] or {}).get("MARK") == self.mark
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def private(self) -> list[Path]:
        """The directory of its own Ray."""
        return [*Path("/tmp").glob(f"pq{self.process.pid}-*")]


def timed(site: Site) -> dict[str, float]:
    """Seconds of every stage, of processes that nothing disturbs."""
    seconds = {}
    for command, stages in STAGES.items():
        job, begun = Job(site, command), []
        for stage in stages:
            wait_for(partial(job.reached, stage))
            begun.append(time.monotonic())
        out, err = job.process.communicate(timeout=PATIENCE)
        assert ended(job, (), out, err) == "finished"
        begun.append(time.monotonic())
        seconds |= {stage: after - before for stage, before, after in zip(stages, begun, begun[1:], strict=False)}
        leaves_nothing(job, err)
    return seconds


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server, qwen3: Path) -> Iterator[Site]:
    s3_server.make_bucket("stopping")
    with FaultProxy("127.0.0.1", s3_server.port) as proxy, pytest.MonkeyPatch.context() as patch:
        for key, value in environment(s3_server.endpoint).items():
            patch.setenv(key, value)
        # A network to speak of: publishing what is tiny takes a moment.
        proxy.latency = 0.03
        found = Site(tmp_path_factory.mktemp("stopping"), qwen3, proxy)
        quantized(configuration(found.finished, qwen3))
        yield found


def attempt(site: Site, plan: Try) -> tuple[str, float]:
    """How a process that gets the signals of the plan ends, and seconds from the first of them to its end."""
    job = Job(site, COMMAND_OF[plan.stage])
    try:
        wait_for(partial(job.reached, plan.stage), pause=0.002)
        time.sleep(plan.share * site.seconds[plan.stage])
        sent = time.monotonic()
        for number in plan.signals:
            job.process.send_signal(number)
            time.sleep(plan.pause)
        out, err = job.process.communicate(timeout=PATIENCE)
        seconds = time.monotonic() - sent
    finally:
        job.process.kill()
    how = ended(job, plan.signals, out, err)
    leaves_nothing(job, f"{plan}\n{err}")
    shutil.rmtree(job.directory)
    return how, seconds


def ended(job: Job, signals: Sequence[signal.Signals], out: str, err: str) -> str:
    """Stopped in order, or finished because the signals came too late for that."""
    case = f"{job.command} with {signals} ended with {job.process.returncode}\n{out}\n{err}"
    for bad in ("Traceback", "Exception ignored", "*** SIG", "Fatal", "bug:", "while stopping"):
        assert bad not in err, case
    if job.process.returncode == 0:
        assert out, case
        assert STOPPED not in err, case
        assert is_complete(job), case
        return "finished"
    assert job.process.returncode in {128 + number for number in signals}, case
    assert err.splitlines()[-1] == STOPPED, case
    if job.command == "publish":
        assert "config.json" not in Store(job.target).list() or is_complete(job), case
    else:
        assert not job.output.exists() or is_complete(job), case
    return "stopped"


def is_complete(job: Job) -> bool:
    expected = digests(job.site.finished / "repository")
    if job.command == "publish":
        return set(Store(job.target).list()) == set(expected)
    return digests(job.output) == expected


def leaves_nothing(job: Job, case: str) -> None:
    assert not job.private(), case
    # Ray's workers end when they notice that their node has.
    wait_for(lambda: not job.left(), pause=0.05)
    assert not [*job.temporary.iterdir()], case
    assert not [*job.directory.glob(".repository.*")], case
    if not (job.run / "run.json").exists():
        return
    store = Store(job.run)
    assert not store.list("lease"), case
    with held(store, ttl=0.0, notice=lambda _: pytest.fail(case)):
        pass  # the next driver need not wait
    state = status.run(str(job.run)).state
    assert state == "measured" or state.startswith("stopped"), case


TRY = st.builds(
    Try,
    # Twice as often where most of a real job's time goes.
    stage=st.sampled_from([*COMMAND_OF, "measuring", "publishing"]),
    share=st.floats(0.0, 1.2),
    signals=st.lists(st.sampled_from(SIGNALS), min_size=1, max_size=3).map(tuple),
    pause=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["importing", "assembling", "publishing"])
def test_two_signals_stop_a_command_in_order(site: Site, stage: str) -> None:
    # At the beginning of the stage.
    site.seconds[stage] = 0.0
    assert attempt(site, Try(stage, 0.0, (signal.SIGTERM, signal.SIGINT), 0.02))[0] == "stopped"


@pytest.mark.faults
@pytest.mark.s3
def test_signals_at_any_moment_stop_a_command_in_order(
    site: Site, record_property: Callable[[str, object], None]
) -> None:
    site.seconds.update(timed(site))
    found: list[tuple[str, str, float]] = []

    # Not the same ones every time; what fails is shown whole, and making it smaller would take an hour.
    @settings(
        max_examples=TRIES // AT_ONCE, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(st.lists(TRY, min_size=AT_ONCE, max_size=AT_ONCE))
    def at_once(plans: Sequence[Try]) -> None:
        # They mostly wait.
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for plan, (how, seconds) in zip(plans, threads.map(partial(attempt, site), plans), strict=True):
                found.append((plan.stage, how, seconds))

    begun = time.monotonic()
    at_once()
    for stage in COMMAND_OF:
        ends = Counter(how for where, how, _ in found if where == stage)
        longest = max((seconds for where, _, seconds in found if where == stage), default=0.0)
        record_property(
            "stopping",
            f"{stage:<10} {ends['stopped']:>3} stopped {ends['finished']:>3} finished, {longest:.1f} s at most",
        )
    record_property("stopping", f"{len(found)} tries in {time.monotonic() - begun:.0f} s")
    assert len(found) >= TRIES
    assert sum(how == "stopped" for _, how, _ in found) > TRIES // 2
