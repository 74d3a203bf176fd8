"""Joining or starting Ray, and the cluster's capacity for workers."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismaquant_ray.errors import ResourceError
from prismaquant_ray.interruption import uninterrupted
from prismaquant_ray.settings.cluster import ClusterConfig

#: Activations of a few microbatches; Ray spills to its temporary directory beyond that.
OBJECT_STORE_BYTES = 512 * 2**20
LOOPBACK = "127.0.0.1"


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Join or start Ray; it is left or stopped at the end of the with-block.

    A Ray started here listens on loopback only, has a token that no file holds and a private temporary directory,
    so that it neither disturbs nor joins another Ray on the machine, and nobody else can use it.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        # Ray prints messages of its nodes on standard output, where results go.
        with redirect_stdout(sys.stderr), _joined(config) if joins(config) else _started(config):
            _set(handler)
            yield
    finally:
        _set(handler)


def _set(handler: Any) -> None:
    """Undo what Ray does to the handler of SIGTERM when it starts and when it ends; Python is not told of all of it."""
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def joins(config: ClusterConfig) -> bool:
    """Whether a run goes to a Ray that is there already, rather than to one it starts on this machine."""
    return config.address not in ("auto", "local") or (config.address == "auto" and "RAY_ADDRESS" in os.environ)


@contextmanager
def _joined(config: ClusterConfig) -> Iterator[None]:
    address = os.environ["RAY_ADDRESS"] if config.address == "auto" else config.address
    _check_answers(address)
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", namespace="prismaquant")
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        # A cluster that requires a token reports a missing one as a connection error.
        raise ResourceError(
            f"Ray at {address} refuses: {str(error).splitlines()[0]}; if its nodes use token authentication, set "
            "RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) here"
        ) from error
    try:
        yield
    finally:
        _leave()


@uninterrupted
def _leave() -> None:
    import ray

    ray.shutdown()


def _check_answers(address: str) -> None:
    """ResourceError unless host:port accepts connections; Ray itself would retry for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        raise ResourceError(f"cluster.address {address} is not host:port")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ResourceError(f"no Ray answers at {address} ({error}); check cluster.address") from error


@functools.cache
def _token() -> str:
    """One per process."""
    return secrets.token_hex(32)


def _read_environment_again(*, loopback: bool) -> None:
    """Ray reads these settings when it is imported, which a user of the library may have done before."""
    import ray._raylet
    from ray._private import ray_constants

    raylet: Any = ray._raylet  # compiled; its stub lacks both names
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = not loopback


@contextmanager
def _started(config: ClusterConfig) -> Iterator[None]:
    # Without a mode Ray would write ~/.ray/auth_token and change how other Rays start, and without the last setting it
    # would put the machine's outer address in place of loopback and listen there.
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    saved = {key: os.environ.get(key) for key in ours}
    os.environ.update(ours)
    _read_environment_again(loopback=True)
    directory = _make_private()
    try:
        _start(config, directory)
        yield
    finally:
        _end(directory, saved)


@uninterrupted
def _make_private() -> str:
    """A directory that only this user can enter. Its name says whose it is.

    Unix socket paths are limited to 107 bytes, so it is not below a user's TMPDIR.
    """
    return tempfile.mkdtemp(prefix=f"pq{os.getpid()}-", dir="/tmp")


@uninterrupted
def _start(config: ClusterConfig, directory: str) -> None:
    """Start Ray as a whole: shutdown ends only processes of a Ray that has started."""
    import ray

    ray.init(
        address="local",
        num_cpus=config.threads * config.workers if config.workers != "auto" else os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        namespace="prismaquant",
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address=LOOPBACK,
        # Ray lets everybody write to its directory; what is around it keeps them out.
        _temp_dir=f"{directory}/ray",
    )


@uninterrupted
def _end(directory: str, saved: Mapping[str, str | None]) -> None:
    import ray

    ray.shutdown()
    _remove(directory)
    for key, value in saved.items():
        os.environ.pop(key)
        if value is not None:
            os.environ[key] = value
    _read_environment_again(loopback=False)


def _remove(directory: str) -> None:
    """Delete Ray's directory; its last processes may still write logs for a moment after shutdown."""
    for _ in range(300):
        shutil.rmtree(directory, ignore_errors=True)
        if not Path(directory).exists():
            return
        time.sleep(0.1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """The cluster's resources: nodes, and how many workers fit, on GPUs or on CPU cores.

    `sharing` is the largest number of workers on one node, which share its memory.
    """

    nodes: int
    workers: int
    sharing: int
    gpu: bool
    gpus: int
    cpus: int
    labels: str = ""

    def __str__(self) -> str:
        where = f"{self.nodes} nodes{f' with labels {self.labels}' if self.labels else ''}"
        return f"the cluster has {self.gpus} GPUs and {self.cpus} CPUs on {where}"


def capacity(config: ClusterConfig) -> Capacity:
    """Room for workers on the nodes that are alive and have the wanted labels."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and _has_labels(node, config)]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpu = config.device == "gpu" or (config.device == "auto" and any(gpus))
    slots = [g if gpu else c // config.threads for g, c in zip(gpus, cpus, strict=True)]
    return Capacity(
        nodes=len(nodes),
        workers=sum(slots),
        sharing=max(1, *slots) if slots else 1,
        gpu=gpu,
        gpus=sum(gpus),
        cpus=sum(cpus),
        labels=", ".join(f"{key}={value}" for key, value in config.labels.items()),
    )


def _has_labels(node: dict[str, object], config: ClusterConfig) -> bool:
    labels = node.get("Labels") or {}
    assert isinstance(labels, dict)
    return all(labels.get(key) == value for key, value in config.labels.items())


def worker_count(config: ClusterConfig, at_most: int) -> int:
    """Workers to ask for; more than `at_most` could never be busy.

    Raises:
        ResourceError: they do not fit, and no autoscaler is waited for (`cluster.wait`).
    """
    found = capacity(config)
    if config.wait > 0:
        return at_most if config.workers == "auto" else min(config.workers, at_most)
    kind = "a GPU" if found.gpu else f"{config.threads} CPUs"
    if found.workers == 0:
        raise ResourceError(
            f"no node can take a worker of {kind}: {found}. Change cluster.device, threads or labels, or set "
            "cluster.wait for nodes that an autoscaler brings"
        )
    if config.workers != "auto" and config.workers > found.workers:
        raise ResourceError(
            f"{config.workers} workers of {kind} were asked for, {found.workers} fit: {found}. Lower cluster.workers "
            "or cluster.threads"
        )
    return min(found.workers if config.workers == "auto" else config.workers, at_most)
