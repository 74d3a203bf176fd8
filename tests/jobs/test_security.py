"""A whole job seen by another user of the machine, and by somebody who looks for secrets in everything it leaves."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import grpc
import psutil
import pytest

from prismaquant_ray.storage.store import Store
from tests.runs import configuration
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, environment
from tests.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
HF_TOKEN = "hf_doNotTellAnybodyThisToken"  # noqa: S105
#: Linux keeps the path of a socket in so many bytes, of which the last is 0.
SOCKET_PATH = 108
#: Names of gRPC calls, one a service of Ray's that runs code, changes state or tells it.
CALLS = (
    "CoreWorkerService/PushTask",
    "NodeManagerService/RequestWorkerLease",
    "NodeManagerService/ShutdownRaylet",
    "ObjectManagerService/Pull",
    "NodeInfoGcsService/GetAllNodeInfo",
    "InternalKVGcsService/InternalKVPut",
    "JobInfoGcsService/AddJob",
    "ReporterService/GetTraceback",
)


def started(directory: Path, settings: Mapping[str, str], *arguments: str, umask: int = 0o022) -> subprocess.Popen[str]:
    """`python -m jobs …` with a directory of its own for temporary files."""
    (directory / "temporary").mkdir(parents=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *arguments],
        cwd=ROOT, env={**clean, "TMPDIR": str(directory / "temporary"), **settings}, umask=umask, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def family(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """A job's processes."""
    try:
        process = psutil.Process(job.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def private(job: subprocess.Popen[str]) -> list[Path]:
    """The directory of a job's own Ray, once there is one."""
    return [*Path("/tmp").glob(f"pq{job.pid}-*")]


# Another user -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o002], ids=["022", "002"])
def test_another_user_reaches_nothing_of_a_local_run(tmp_path: Path, qwen3: Path, umask: int) -> None:
    configuration(tmp_path, qwen3)
    # Longer than looking takes.
    slow = ("calibration.sequences=90", "calibration.microbatch=1", "cluster.blocks_per_shard=1", "cluster.wait=600")
    settings = [word for setting in slow for word in ("--set", setting)]
    job = started(tmp_path, {}, "quantize", str(tmp_path / "config.yaml"), *settings, umask=umask)
    try:
        wait_for(lambda: [*(tmp_path / "run").glob("forward/*/*")], job)
        nobody_else_can_enter(job)
        no_socket_has_no_path_and_no_memory_has_a_name(job)
        ports_want_the_token(job)
        assert job.poll() is None, "it ended while it was looked at"
    finally:
        job.terminate()
        job.communicate(timeout=PATIENCE)


def as_another(look: Callable[[], list[str]]) -> list[str]:
    """What a process of another user finds, who is in this user's groups; nothing where only root could start one."""
    if os.geteuid() != 0:
        return []  # the mode of the directory says the same
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        os.write(writing, json.dumps(look()).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as stream:  # noqa: PTH123
        text = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    found: list[str] = json.loads(text)
    return found


def nobody_else_can_enter(job: subprocess.Popen[str]) -> None:
    (directory,) = private(job)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    paths = [directory, *directory.rglob("*")]
    sockets = [path for path in paths if path.is_socket()]
    assert {path.name for path in sockets} >= {"raylet", "plasma_store"}
    assert max(len(str(path)) for path in sockets) + 10 < SOCKET_PATH, "longer process ids have room"

    def reached() -> list[str]:
        open_to = []
        for path in paths:
            with suppress(OSError):
                path.stat() if path != directory else os.listdir(path)  # noqa: PTH208
                open_to.append(f"{path} can be looked at")
        for path in sockets:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                open_to.append(f"{path} can be connected to")
        with suppress(OSError):
            (directory / "mine").touch()
            open_to.append(f"{directory} can be written to")
        return open_to

    assert as_another(reached) == []


def no_socket_has_no_path_and_no_memory_has_a_name(job: subprocess.Popen[str]) -> None:
    for process in family(job):
        with suppress(psutil.NoSuchProcess):
            unnamed = [
                link.laddr for link in process.net_connections("unix") if str(link.laddr).startswith(("@", "\0"))
            ]
            assert unnamed == [], process
    mapped = {path for process in family(job) for path in shared(process.pid)}
    assert any("plasma" in path for path in mapped)
    assert [path for path in mapped if Path(path).exists()] == []


def shared(pid: int) -> set[str]:
    """Files of shared memory that a process has mapped."""
    with suppress(OSError):
        return {path.strip() for path in re.findall(r"/dev/shm/.*", Path(f"/proc/{pid}/maps").read_text())}
    return set()


def ports_want_the_token(job: subprocess.Popen[str]) -> None:
    ports = set()
    for process in family(job):
        with suppress(psutil.NoSuchProcess):
            for link in process.net_connections("inet"):
                if link.status == psutil.CONN_LISTEN:
                    assert link.laddr.ip.removeprefix("::ffff:") == "127.0.0.1", process
                    ports.add(link.laddr.port)
    answers = {port: asked(port) for port in ports}
    states = {code_of(port, "NodeInfoGcsService/GetAllNodeInfo", token_of(job)) for port in ports}
    assert grpc.StatusCode.OK in states, "with the token there is an answer"
    assert set(answers.values()) == {"wants a token", "figures"}
    assert sum(answer == "wants a token" for answer in answers.values()) > 5


def asked(port: int) -> str:
    """What a port says to whoever has no token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/api/version")
        answer = connection.getresponse()
        body = answer.read().decode()
    except http.client.BadStatusLine:
        return called(port)
    finally:
        connection.close()
    if answer.status == 401:
        return "wants a token"
    # Prometheus' exporters say the same whatever they are asked.
    return "figures" if body.startswith("# HELP") else f"{answer.status} {body}"


def called(port: int) -> str:
    """What a gRPC port says to every call without a token, or the first that it answers otherwise."""
    codes = {name: code_of(port, name) for name in CALLS}
    codes = {name: code for name, code in codes.items() if code is not grpc.StatusCode.UNIMPLEMENTED}
    return "wants a token" if {*codes.values()} == {grpc.StatusCode.UNAUTHENTICATED} else f"{codes}"


def code_of(port: int, name: str, token: str = "") -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            metadata = [("authorization", f"Bearer {token}")] if token else []
            channel.unary_unary(f"/ray.rpc.{name}")(b"", timeout=30, metadata=metadata)
        except grpc.RpcError as refused:
            code: grpc.StatusCode = refused.code()
            return code
        return grpc.StatusCode.OK


def token_of(job: subprocess.Popen[str]) -> str:
    """The token of a job's own Ray, which its processes have from their environment."""
    for process in family(job):
        with suppress(psutil.NoSuchProcess):
            token = process.environ().get("RAY_AUTH_TOKEN", "")
            if token:
                return token
    return ""


# Secrets ----------------------------------------------------------------------------------------------------------


class Watcher:
    """Looks for secrets in the command lines of a job's processes and in the files of its Ray, as long as it runs."""

    def __init__(self, job: subprocess.Popen[str], secrets: dict[str, str]) -> None:
        self.job = job
        self.secrets = secrets
        self.found: set[str] = set()
        self.looked_at: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def look(self, name: str, data: bytes) -> None:
        """Note what of the secrets is in some bytes, plain or encoded."""
        self.looked_at.add(name)
        self.found |= {f"{title} in {name}" for title, secret in self.secrets.items() if shows(data, secret)}

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            if "the token of Ray" not in self.secrets and (token := token_of(self.job)):
                self.secrets["the token of Ray"] = token
            for process in family(self.job):
                with suppress(psutil.NoSuchProcess):
                    self.look("a command line", "\n".join(process.cmdline()).encode())
            for directory in private(self.job):
                for path in directory.rglob("*"):
                    with suppress(OSError):
                        if path.is_file():
                            self.look(re.sub(r"[0-9a-f]{20,}.*|\d+", "", path.name), path.read_bytes())


def shows(data: bytes, secret: str) -> bool:
    """Whether some bytes hold a secret: as it is, in a URL, in base64 at any offset, in lines of base64."""
    plain = secret.encode()
    encoded = (base64.b64encode(b"\0" * offset + plain)[4 if offset else 0 : -4] for offset in range(3))
    spellings = (plain, quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode(), *encoded)
    return any(spelling in data for spelling in spellings)


@pytest.mark.s3
def test_a_whole_job_shows_its_secrets_nowhere(tmp_path: Path, s3_server: S3Server, qwen3: Path) -> None:
    s3_server.make_bucket("secrets")
    configuration(tmp_path, qwen3)
    places = ("--set", "store.run=s3://secrets/run", "--set", "store.output=s3://secrets/repository")
    secrets = {"AWS key": ACCESS_KEY, "AWS secret": SECRET_KEY, "token of the hub": HF_TOKEN}
    settings = {**environment(s3_server.endpoint), "HF_TOKEN": HF_TOKEN, "AWS_SESSION_TOKEN": ""}
    config = str(tmp_path / "config.yaml")
    looked_at: set[str] = set()
    for number, command in enumerate(("quantize", "report", "status", "verify")):
        arguments = ("s3://secrets/run",) if command == "status" else (config, *places)
        job = started(tmp_path / str(number), settings, command, *arguments, "--debug")
        watcher = Watcher(job, secrets)
        with watcher.watching():
            out, err = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, err
        watcher.look("what is printed", (out + err).encode())
        with pytest.MonkeyPatch.context() as patch:
            for key, value in environment(s3_server.endpoint).items():
                patch.setenv(key, value)
            store = Store("s3://secrets")
            for key in store.list():
                watcher.look(key, store.get(key))
        assert watcher.found == set()
        looked_at |= watcher.looked_at
    assert {"a command line", "raylet.out", "gcs_server.out", "what is printed"} <= looked_at
    assert {"run/run.json", "run/events.jsonl", "run/report/report.html", "repository/prismaquant.json"} <= looked_at
    assert "the token of Ray" in secrets
    assert shows(base64.b64encode(b"x" + SECRET_KEY.encode() + b"yz"), SECRET_KEY), "the test sees what it looks for"


@pytest.mark.s3
@pytest.mark.parametrize(
    ("place", "settings"),
    [
        ("s3://secrets-elsewhere/run", {"AWS_SECRET_ACCESS_KEY": "hunter2hunter2"}),
        ("s3://me:hunter2hunter2@secrets/run", {}),
        ("s3://secrets/run?password=hunter2hunter2", {}),
        ("s3://secrets/run", {"AWS_ENDPOINT_URL": "http://me:hunter2hunter2@127.0.0.1:9"}),
    ],
    ids=["wrong", "in the URI", "as a parameter", "in the endpoint"],
)
def test_what_is_refused_is_not_repeated(
    tmp_path: Path, s3_server: S3Server, qwen3: Path, place: str, settings: dict[str, str]
) -> None:
    configuration(tmp_path, qwen3)
    arguments = ("quantize", str(tmp_path / "config.yaml"), "--set", f"store.run={place}", "--debug")
    everything = {**environment(s3_server.endpoint), "HF_TOKEN": HF_TOKEN, **settings}
    job = started(tmp_path / "job", everything, *arguments)
    out, err = job.communicate(timeout=PATIENCE)
    assert "InputError" in err, "the traceback is shown"
    assert not any(
        shows((out + err).encode(), secret) for secret in ("hunter2hunter2", ACCESS_KEY, SECRET_KEY, HF_TOKEN)
    )
