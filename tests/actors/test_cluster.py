"""Claims about what a cluster has room for, from what Ray says of its nodes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from actors.connect import capacity, joins, worker_count
from actors.memory_plan import Free
from prismaquant_ray.errors import ResourceError
from prismaquant_ray.events import Machine
from prismaquant_ray.settings.cluster import ClusterConfig


def node(cpus: float, gpus: float = 0, *, alive: bool = True, **labels: str) -> dict[str, Any]:
    resources = {"CPU": cpus, "memory": 1e9, **({"GPU": gpus} if gpus else {})}
    return {"Alive": alive, "Resources": resources, "Labels": {"ray.io/node-id": "x", **labels}}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    # Not the real module: Ray decides on its authentication when it is first imported in a process.
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: found))
    return found


def test_a_worker_takes_a_gpu_where_there_are_any_and_cores_otherwise(nodes: list[dict[str, Any]]) -> None:
    nodes += [node(0), node(8), node(7)]
    assert capacity(ClusterConfig(threads=2)).workers == 4 + 3
    assert not capacity(ClusterConfig(threads=2)).gpu
    nodes.append(node(16, 4))
    assert (capacity(ClusterConfig()).workers, capacity(ClusterConfig()).gpu) == (4, True)
    assert (capacity(ClusterConfig(device="cpu")).workers, capacity(ClusterConfig(device="cpu")).gpu) == (31, False)


def test_dead_nodes_and_nodes_with_other_labels_do_not_count(nodes: list[dict[str, Any]]) -> None:
    nodes += [node(4, pool="spot"), node(4, pool="fixed"), node(4, alive=False, pool="spot")]
    found = capacity(ClusterConfig(labels={"pool": "spot"}))
    assert (found.nodes, found.workers) == (1, 4)
    assert str(found) == "the cluster has 0 GPUs and 4 CPUs on 1 nodes with labels pool=spot"


def machine(device: str, free: int, host: int | None = None) -> Machine:
    return Machine(version="", pid=1, host="here", device=device, free_bytes=free, host_bytes=0, host_free_bytes=host)


def test_workers_of_one_node_share_its_memory_but_not_its_gpus(nodes: list[dict[str, Any]]) -> None:
    nodes += [node(4), node(2)]
    sharing = capacity(ClusterConfig()).sharing
    assert sharing == 4
    assert Free.of(machine("cpu", 400), sharing) == Free(memory=100)
    nodes.append(node(8, 8))
    sharing = capacity(ClusterConfig()).sharing
    assert sharing == 8
    assert Free.of(machine("NVIDIA H100", 80, host=400), sharing) == Free(memory=80, host=50, gpu=True)
    # A chip that is GPU and CPU at once.
    assert Free.of(machine("NVIDIA GB10", 120), 1) == Free(memory=120, gpu=True)
    nodes.clear()
    assert capacity(ClusterConfig()).sharing == 1


def test_never_more_workers_than_fit_or_could_be_busy(nodes: list[dict[str, Any]]) -> None:
    nodes += [node(4), node(4)]
    assert worker_count(ClusterConfig(), at_most=3) == 3
    assert worker_count(ClusterConfig(), at_most=30) == 8
    assert worker_count(ClusterConfig(workers=5), at_most=30) == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"device": "gpu"}, "no node can take a worker of a GPU: the cluster has 0 GPUs and 8 CPUs on 2 nodes"),
        ({"threads": 6}, "no node can take a worker of 6 CPUs"),
        ({"workers": 9}, "9 workers of 1 CPUs were asked for, 8 fit"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    nodes: list[dict[str, Any]], config: dict[str, Any], message: str
) -> None:
    nodes += [node(4), node(4)]
    with pytest.raises(ResourceError, match=message):
        worker_count(ClusterConfig(**config), at_most=30)


def test_an_autoscaler_is_asked_for_what_could_be_busy(nodes: list[dict[str, Any]]) -> None:
    nodes.append(node(0))
    assert worker_count(ClusterConfig(device="gpu", wait=1800), at_most=16) == 16
    assert worker_count(ClusterConfig(device="gpu", workers=4, wait=1800), at_most=16) == 4


def test_a_submitted_job_joins_its_cluster_and_a_laptop_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not joins(ClusterConfig())
    assert joins(ClusterConfig(address="10.0.0.1:6379"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert joins(ClusterConfig())
    assert not joins(ClusterConfig(address="local"))
