"""A real S3 server (SeaweedFS) in a temporary directory, on loopback and ports nobody else has, or on another host.

`kill` and `restart` keep the data and the ports: that is what an outage looks like to a client.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ACCESS_KEY = "PQTESTADMINKEY"
SECRET_KEY = "pq/test+admin/secret"  # noqa: S105
READER_KEY = "PQTESTREADERKEY"
READER_SECRET = "pq/test+reader/secret"  # noqa: S105
_IDENTITIES = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "List", "Write", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": ["Read", "List"],
        },
    ]
}
# SeaweedFS takes port + 10000 for gRPC. Both stay below the ports the kernel hands out to clients.
_PORTS = range(11_000, 22_000)
_GRPC = 10_000
_SERVICES = ("s3", "master", "volume", "filer", "admin")


class S3Server:
    """One server; `with S3Server() as server`, or `start` and `stop`.

    `inside` is the command that starts others where `address` is this machine's.
    """

    def __init__(self, address: str = "127.0.0.1", inside: Sequence[str] = ()) -> None:
        self.address, self.inside = address, inside
        self.directory = Path(tempfile.mkdtemp(prefix="pq-s3-"))
        self.ports: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        return self.ports["s3"]

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client's process needs."""
        return environment(self.endpoint)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        # Between choosing a port and taking it another session may have taken it.
        for _ in range(5):
            self.ports = _free_ports()
            if self._launch():
                return
        raise RuntimeError(f"the S3 server does not start:\n{self.log()}")

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        for service, port in self.ports.items():
            # Its gRPC sockets; there is no option for their place.
            Path(f"/tmp/seaweedfs-{service}-grpc-{port + _GRPC}.sock").unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, connections are cut."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        """Run again, with the data and on the ports it had."""
        self.kill()
        if not self._launch():
            raise RuntimeError(f"the S3 server does not start again:\n{self.log()}")

    def make_bucket(self, name: str) -> str:
        """An empty bucket (at least three characters); returns its URI."""
        # A directory of the filer is a bucket; the S3 call for it would have to be signed.
        url = f"http://{self.address}:{self.ports['filer']}/buckets/{name}/"
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=30):
            return f"s3://{name}"

    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self) -> bool:
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        identities = self.directory / "identities.json"
        identities.write_text(json.dumps(_IDENTITIES))
        command = [
            *self.inside,
            str(Path(sys.executable).with_name("weed")),
            "mini",
            f"-dir={data}",
            f"-ip={self.address}",
            f"-ip.bind={self.address}",
            *(f"-{service}.port={port}" for service, port in self.ports.items()),
            f"-s3.config={identities}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.localSocket={self.directory / 's3.sock'}",
            f"-filer.localSocket={self.directory / 'filer.sock'}",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
        ]
        # Without AWS_*: they would become identities of the server.
        clean = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=clean, start_new_session=True)
        for _ in range(600):
            if self.process.poll() is not None:
                self.process = None
                return False
            if self._answers():
                return True
            time.sleep(0.1)
        self.kill()
        return False

    def _answers(self) -> bool:
        """The filer lists buckets and S3 refuses a stranger: both are up."""
        for url, status in ((f"http://{self.address}:{self.ports['filer']}/", 200), (f"{self.endpoint}/", 403)):
            try:
                with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310
                    found = response.status
            except urllib.error.HTTPError as error:
                found = error.code
                error.close()
            except OSError:
                return False
            if found != status:
                return False
        return True


def environment(endpoint: str, key: str = ACCESS_KEY, secret: str = SECRET_KEY) -> dict[str, str]:
    """AWS_* variables for a client of `endpoint`."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }


def _free_ports() -> dict[str, int]:
    ports: dict[str, int] = {}
    while len(ports) < len(_SERVICES):
        port = random.SystemRandom().choice(_PORTS)
        if port not in ports.values() and _is_free(port) and _is_free(port + _GRPC):
            ports[_SERVICES[len(ports)]] = port
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
