"""Separate hosts on this machine, with networks that can be cut: a Ray head, two workers' nodes, a driver's, a store.

Each has network, PID, mount and UTS namespaces of its own, so its own addresses, processes, /dev/shm and name; files
are shared otherwise. Whatever happens, nothing is left: a host ends with its first process, which ends with ours.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import psutil

from tests.network import Network
from tests.ray_cluster import QUICK, TITLE
from tests.s3_server import S3Server, environment
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[1]
_GCS_PORT = 6379
# The ends of the network: this process, then the hosts.
_HERE = 1
HEAD, ONE, TWO, DRIVER, STORE = "head", "one", "two", "driver", "store"
NAMES = (HEAD, ONE, TWO, DRIVER, STORE)
# A lost node is missed after 7.5 seconds: three checks of two seconds, each half a second after the other.
_MISSED = {**QUICK, "RAY_health_check_timeout_ms": "2000"}
# Ray would have its workers yield to whatever else computes on this machine.
_BUSY = {"RAY_worker_niceness": "0"}
_CPUS = {HEAD: 0, ONE: 1, TWO: 1, DRIVER: 0}


class CommandError(Exception):
    """A command on a host failed."""


class Host:
    """Namespaces, held by a first process that reaps and that ends when its input does."""

    def __init__(self, name: str, end: int, private: Path) -> None:
        self.name, self.end = name, end
        setting_up = (
            "mount -t tmpfs tmpfs /dev/shm",
            # What Ray keeps on a disk of its own.
            f"mount -t tmpfs tmpfs {shlex.quote(str(private))}",
            "ip link set lo up",
            f"echo {name} > /proc/sys/kernel/hostname",
            f"echo 127.0.0.1 localhost {name} > {shlex.quote(str(private / 'hosts'))}",
            f"mount --bind {shlex.quote(str(private / 'hosts'))} /etc/hosts",
            # Who ignores the end of children need not wait for them.
            "trap '' CHLD; echo ready; exec cat > /dev/null",
        )
        unshared = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
        self._unshare = subprocess.Popen(
            [*unshared, "sh", "-c", " && ".join(setting_up)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "ready\n":
            _, said = self._unshare.communicate()
            raise AssertionError(
                f"these tests need hosts of their own, and this machine gives none: {said.strip()}. They need root and "
                "a kernel with network, PID, mount and UTS namespaces"
            )
        self.init = psutil.Process(self._unshare.pid).children()[0].pid

    @property
    def inside(self) -> list[str]:
        """What starts a command in this host."""
        return ["nsenter", f"--target={self.init}", "--net", "--pid", "--mount", "--uts", "--"]

    def run(self, *command: str, **variables: str) -> str:
        """The output of a command, which must succeed."""
        done = subprocess.run(
            [*self.inside, *command], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True,
            timeout=PATIENCE,
        )  # fmt: skip
        if done.returncode != 0:
            raise CommandError(f"{self.name}: {' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def doing(self, stage: str, kind: str) -> bool:
        """Whether a worker here is taking a step of this kind."""
        for directory in Path(f"/proc/{self.init}/root/proc").glob("[0-9]*"):
            try:
                title = (directory / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            found = TITLE.match(title)
            if found and found.groups() == (stage, kind):
                return True
        return False

    def signal(self, name: str) -> None:
        """Send every process a signal, but for the first one."""
        # In a PID namespace -1 is everybody there.
        self.run("sh", "-c", f"kill -{name} -1 || true")

    def close(self) -> None:
        self._unshare.communicate()


@dataclass(slots=True)
class Driven:
    """A driver under way: what it said on standard error, and when."""

    process: subprocess.Popen[str]
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    said: list[tuple[float, str]] = field(default_factory=list)
    out: str = ""
    _threads: list[threading.Thread] = field(default_factory=list)

    def listen(self) -> Driven:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._start(self._errors, self.process.stderr)
        self._start(self._results, self.process.stdout)
        return self

    def _start(self, function: Callable[[TextIO], None], source: Any) -> None:
        thread = threading.Thread(target=function, args=(source,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _errors(self, source: TextIO) -> None:
        with source:
            for line in source:
                self.said.append((time.monotonic(), line.rstrip("\n")))

    def _results(self, source: TextIO) -> None:
        with source:
            self.out = source.read()

    @property
    def err(self) -> str:
        return "\n".join(line for _, line in self.said)

    def until(self, what: Callable[[], Any], patience: float = PATIENCE) -> Any:
        """What `what` returns once it is true; fails when the driver ends before, or takes too long."""
        limit = time.monotonic() + patience

        def found() -> Any:
            assert self.process.poll() is None, f"the driver ended before what was waited for:\n{self.err}"
            assert time.monotonic() < limit, f"what was waited for did not come in {patience:.0f} s:\n{self.err}"
            return what()

        return wait_for(found, pause=0.02)

    def end(self, code: int = 0, patience: float = PATIENCE) -> dict[str, Any]:
        """The result of a driver that ends in this way."""
        found = self.process.wait(timeout=patience)
        self.ended = time.monotonic()
        for thread in self._threads:
            thread.join()
        assert found == code, f"exit code {found}:\n{self.err}"
        result: dict[str, Any] = json.loads(self.out) if self.out else {}
        return result

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def silence(self) -> float:
        """The longest time between two lines."""
        times = [at for at, _ in self.said] + [self.ended]
        return max(after - before for before, after in itertools.pairwise(times))


class Hosts:
    """`with Hosts() as hosts:` a Ray cluster, an S3 server and a host for drivers, each on a host of its own.

    `cut`, `deafen` and `freeze` are faults, `heal` ends them, and `restore` also starts the nodes again that the
    cluster has given up. `network` loses and delays.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._driven: list[Driven] = []
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Hosts:
        with ExitStack() as stack:
            private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pqh", dir="/tmp")))
            self.network = Network()
            for end, name in enumerate(NAMES, _HERE + 1):
                self.hosts[name] = host = Host(name, end, private)
                stack.callback(host.close)
                self.network.attach(end, host.init)
            self.network.attach(_HERE)
            stack.enter_context(self.network)
            self.server = S3Server(self.network.address(self.hosts[STORE].end), self.hosts[STORE].inside)
            stack.enter_context(self.server)
            # `stop` ends what entered the host, and the server goes on there.
            stack.callback(self.hosts[STORE].signal, "KILL")
            self.variables = {
                **_MISSED,
                **_BUSY,
                **environment(self.server.endpoint),
                "RAY_TMPDIR": str(private),
                "HF_HUB_OFFLINE": "1",
            }
            self._ray = private / "ray"
            self._start_ray()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        return f"{self.network.address(self.hosts[HEAD].end)}:{_GCS_PORT}"

    # Ray ----------------------------------------------------------------------------------------------------------

    def _start_ray(self) -> None:
        self._join(HEAD, "--head", f"--port={_GCS_PORT}", "--include-dashboard=false", f"--temp-dir={self._ray}")
        self.restore()

    def _join(self, name: str, *how: str, **variables: str) -> None:
        host = self.hosts[name]
        host.run(
            sys.executable, "-m", "ray.scripts.scripts", "start", *how, f"--num-cpus={_CPUS[name]}",
            f"--node-ip-address={self.network.address(host.end)}", f"--object-store-memory={100 * 2**20}",
            **{**self.variables, **variables},
        )  # fmt: skip

    def alive(self) -> set[str]:
        """The hosts that the cluster takes for alive."""
        from ray._raylet import GcsClient

        nodes = GcsClient(address=self.address).get_all_node_info(timeout=30).values()
        # The state's first value is ALIVE.
        addresses = {node.node_manager_address for node in nodes if node.state == 0}
        return {name for name, host in self.hosts.items() if self.network.address(host.end) in addresses}

    def restore(self, **variables: str) -> None:
        """No faults, and every node in the cluster; those that are started now get more environment variables."""
        self.heal()
        if any(driver.process.poll() is None for driver in self._driven):
            self.leave(DRIVER)
        limit = time.monotonic() + PATIENCE
        # A machine that is busy with something else may lose a node again while another is started, or not start one.
        while missing := sorted(_CPUS.keys() - self.alive()):
            assert time.monotonic() < limit, f"{missing} do not stay in the cluster"
            with ThreadPoolExecutor(len(missing)) as threads:
                list(threads.map(lambda name: self._rejoin(name, variables), missing))

    def _rejoin(self, name: str, variables: Mapping[str, str]) -> None:
        self.hosts[name].signal("KILL")
        with suppress(CommandError):
            self._join(name, f"--address={self.address}", **variables)
        limit = time.monotonic() + 10
        while name not in self.alive() and time.monotonic() < limit:
            time.sleep(0.1)

    def leave(self, name: str) -> None:
        """End a node, so that `restore` starts it again."""
        self.hosts[name].signal("KILL")
        wait_for(lambda: name not in self.alive(), pause=0.1)

    def drive(self, command: Sequence[str | Path], **variables: str) -> Driven:
        """`python -m jobs COMMAND …` on the driver's host."""
        address = f"cluster.address={self.address}"
        arguments = [sys.executable, "-m", "jobs", *map(str, command), "--json", "--set", address]
        process = subprocess.Popen(
            [*self.hosts[DRIVER].inside, *arguments],
            cwd=ROOT,
            env={**os.environ, **self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._driven.append(Driven(process).listen())
        return self._driven[-1]

    # Faults -------------------------------------------------------------------------------------------------------

    def cut(self, name: str, *others: str) -> None:
        """Nothing gets through between a host and others, by default all of them."""
        ends = [self.hosts[other].end for other in others or NAMES if other != name]
        here = self.hosts[name].end
        self.network.withhold([(here, end) for end in ends] + [(end, here) for end in ends])

    def deafen(self, name: str) -> None:
        """A host can send, but gets nothing."""
        here = self.hosts[name].end
        self.network.withhold([(self.hosts[other].end, here) for other in NAMES if other != name])

    def freeze(self, name: str) -> None:
        """Everything on a host stands still until `wake` or `heal`."""
        self.hosts[name].signal("STOP")

    def wake(self, name: str) -> None:
        self.hosts[name].signal("CONT")

    def heal(self) -> None:
        """No faults."""
        self.network.heal()
        for name in self.hosts:
            self.wake(name)


def wrong_clock(directory: Path, seconds: int) -> dict[str, str]:
    """Variables of a process whose clock is wrong; needs g++."""
    library = directory / "wrong_clock.so"
    if not library.exists():
        source = Path(__file__).with_name("wrong_clock.cpp")
        subprocess.run(["g++", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return {"LD_PRELOAD": str(library), "WRONG_BY": str(seconds)}
