"""Settings every test runs under, fixtures that are made once, and which process runs what."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before transformers is imported: nothing is fetched, nothing draws bars.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Before Triton is imported: its kernels run on a CPU.
os.environ["TRITON_INTERPRET"] = "1"
# Before torch is imported, here and in the processes that tests start: sums do not depend on the machine or the order
# of tests, and two test processes do not fight for the cores.
os.environ.update({f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")})

# What a shell starts in the background ignores Ctrl-C, and so would every process that a test means to stop by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from _pytest.nodeid import NodeId
from hypothesis import settings

from tests.s3_server import S3Server

if TYPE_CHECKING:
    from tests.ray_head import Head
    from tests.repositories import Model

# A slow machine is not a failure; nothing is timed in tests.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

torch.set_num_interop_threads(1)


def pytest_runtest_setup() -> None:
    """One thread whatever the test before has set: a worker that is set up in this process sets it, too."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny checkpoint of every family, made when it is first asked for; do not write into it."""

    class Made(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            from tests.tiny_families import make_family

            self[family] = make_family(tmp_path_factory.mktemp("family") / family, family)
            return self[family]

    return Made()


@pytest.fixture(scope="session")
def family_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """The model of an architecture or a family with round-to-nearest candidates, made once; do not write into it."""
    from tests.repositories import make_model

    return functools.cache(lambda name: make_model(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The S3 server of this process; buckets are made by those who need them, with names of their own."""
    with S3Server() as running:
        yield running


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with every dependency and without this project."""
    from tests.ray_head import make_bare

    return make_bare(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="session")
def head(bare: Path) -> Iterator[Head]:
    """A Ray cluster whose node has the dependencies but not this project; jobs and drivers bring it."""
    from tests.ray_head import started

    # Workers of a tiny model spend most of their life importing; let them do it before they are needed.
    with started(bare, {"RAY_preload_python_modules": "torch,transformers"}) as found:
        yield found


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of four layers; do not write into it."""
    from tests.tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("source") / "qwen3", "qwen3", layers=4)


@pytest.fixture(scope="session")
def qwen3_digests(tmp_path_factory: pytest.TempPathFactory, qwen3: Path) -> dict[str, str]:
    """What an undisturbed run of `tests.runs.configuration` writes of it."""
    from tests.runs import configuration, digests, quantized

    config = configuration(tmp_path_factory.mktemp("expected"), qwen3)
    quantized(config)
    return digests(config.store.output)


def _group(item: pytest.Item) -> str:
    """What must run in one process: what starts Ray or measures memory, what needs the S3 server, or a module."""
    if any(item.get_closest_marker(name) for name in ("ray", "memory", "faults")):
        return "ray"
    return "s3" if item.get_closest_marker("s3") else item.nodeid.partition("::")[0]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `pytest -n 2 --dist loadgroup`: groups, the longest first, so that all processes end together."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(_group(item), []).append(item)

    def length(name: str) -> tuple[bool, int]:
        slow = sum(item.get_closest_marker("slow") is not None for item in groups[name])
        return name == "ray", len(groups[name]) + 50 * slow

    items[:] = [item for name in sorted(groups, key=length, reverse=True) for item in groups[name]]
    for item in items:
        # pytest-xdist 3.8 reads the group behind the last @ of an id, but writes it where pytest 9.2 has no id:
        # its own mark, xdist_group, has no effect.
        item._id = NodeId.parse(f"{item.nodeid}@{_group(item)}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests recorded with `record_property`, under its name."""
    lines: dict[str, list[str]] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for title, line in getattr(report, "user_properties", ()):
            lines.setdefault(title, []).append(str(line))
    for title, found in lines.items():
        terminalreporter.section(title)
        for line in dict.fromkeys(found):
            terminalreporter.line(line)
