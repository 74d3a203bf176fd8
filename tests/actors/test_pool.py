"""What Ray is asked for, and what its errors mean: without a cluster, with the exceptions that Ray constructs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray import exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext

from actors.connect import Capacity
from actors.messages import WorkerSpec
from actors.pool import RayWorker, RayWorkers, Sent
from actors.protocol import Call, CallKind, Reply
from actors.schedule.recovery import Cause
from prismaquant_ray.errors import ResourceError, WorkerBugError
from tests.runs import configuration
from tests.tiny import make_checkpoint

#: The words by which the loss of a node is told from that of a process, and one of Ray's own sentences with them.
NODE_IS_GONE = {
    "node has died": "The actor died because its node has died. Node Id: ",
    "node was terminated": "the actor's node was terminated unexpectedly: ",
}


class Asked:
    """In place of Ray: the options that an actor class was given."""

    def __init__(self) -> None:
        self.options_given: dict[str, Any] = {}
        self.killed: list[object] = []

    def remote(self, _: type) -> Asked:
        return self

    def options(self, **options: Any) -> Asked:
        self.options_given = options
        return self


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()
    monkeypatch.setattr(ray, "remote", found.remote)
    monkeypatch.setattr(ray, "kill", found.killed.append)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0"))
    monkeypatch.setattr(ray, "nodes", list)
    return found


@pytest.fixture
def workers(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayWorkers]:
    """Workers of a cluster of two nodes, by overrides of a configuration."""

    def make(*overrides: str, gpus: int = 0) -> RayWorkers:
        room = Capacity(nodes=2, workers=4, sharing=2, gpu=gpus > 0, gpus=gpus, cpus=8)
        monkeypatch.setattr("actors.pool.capacity", lambda _: room)
        config = configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"), *overrides)
        source, run = config.model.source, str(config.store.run)
        return RayWorkers(WorkerSpec(name="", config=config, source=source, revision="main", run=run))

    return make


def test_placement_and_labels_reach_the_actors(workers: Callable[..., RayWorkers], asked: Asked) -> None:
    workers()
    assert asked.options_given["scheduling_strategy"] == "SPREAD"
    assert not {"label_selector", "memory"} & set(asked.options_given)
    workers("cluster.placement=pack", "cluster.labels={pool: spot, zone: a}")
    assert asked.options_given["scheduling_strategy"] == "DEFAULT"
    assert asked.options_given["label_selector"] == {"pool": "spot", "zone": "a"}


def test_cores_memory_and_gpus_reach_the_actors(workers: Callable[..., RayWorkers], asked: Asked) -> None:
    workers("cluster.threads=3", "cluster.memory=2GB")
    given = asked.options_given
    assert (given["num_cpus"], given["num_gpus"], given["memory"]) == (3, 0, 2_000_000_000)
    assert (given["max_restarts"], given["max_task_retries"]) == (0, 0), "the driver must see why a worker died"
    workers("cluster.threads=3", "cluster.memory=2GB", gpus=4)
    assert (asked.options_given["num_cpus"], asked.options_given["num_gpus"]) == (1, 1)
    assert "memory" not in asked.options_given, "Ray counts memory of nodes, not of GPUs"


@pytest.mark.parametrize("gpus", [0, 4])
def test_a_worker_knows_whether_it_was_given_a_gpu(workers: Callable[..., RayWorkers], gpus: int) -> None:
    specs: list[Any] = []
    found = workers(gpus=gpus)
    found._actors["worker-0"] = SimpleNamespace(setup=SimpleNamespace(remote=specs.append))
    found.submit("worker-0", Call(kind=CallKind.SETUP))
    assert [(spec.name, spec.gpu) for spec in specs] == [("worker-0", gpus > 0)]


def test_rays_own_options_have_these_names(workers: Callable[..., RayWorkers], asked: Asked) -> None:
    from ray._common.ray_option_utils import actor_options

    workers("cluster.labels={pool: spot}", "cluster.memory=2GB")
    assert set(asked.options_given) <= set(actor_options)


# Errors -----------------------------------------------------------------------------------------------------------


def reply(workers: RayWorkers, error: Exception, monkeypatch: pytest.MonkeyPatch) -> Reply:
    """What becomes of a call that ends so."""

    def get(_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "get", get)
    workers._actors["worker-0"] = "the actor"
    workers._flying["the call"] = Sent("worker-0", "backward run exit-00000, microbatch 0")
    return workers._reply("the call")


def died(message: str) -> exceptions.ActorDiedError:
    """As Ray constructs it."""
    context = ActorDiedErrorContext(class_name="ShardWorker", actor_id=bytes(16), pid=7, error_message=message)
    return exceptions.ActorDiedError(context)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (died(NODE_IS_GONE["node has died"] + "0" * 56), Cause.NODE),
        (died(NODE_IS_GONE["node was terminated"] + "health check failed"), Cause.NODE),
        (died("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"), Cause.PROCESS),
        (exceptions.ActorDiedError(), Cause.PROCESS),
        (exceptions.WorkerCrashedError(), Cause.PROCESS),
        (exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), Cause.MEMORY),
    ],
    ids=["node died", "node terminated", "process died", "unknown", "worker crashed", "out of memory"],
)
def test_a_lost_worker_is_reported_with_its_cause_and_killed(
    workers: Callable[..., RayWorkers], asked: Asked, monkeypatch: pytest.MonkeyPatch, error: Exception, cause: Cause
) -> None:
    found = reply(workers(), error, monkeypatch)
    assert found.lost is not None
    assert found.lost[0] is cause
    assert found.lost[1] == str(error).strip().splitlines()[0]
    assert asked.killed == ["the actor"], "what is only unreachable must not go on writing"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (exceptions.OutOfDiskError("no room for 3 MB"), "Ray on the node of worker-0: no room for 3 MB"),
        (
            exceptions.RuntimeEnvSetupError("pip failed"),
            "Ray on the node of worker-0: Failed to set up runtime environment.",
        ),
        (died("ModuleNotFoundError: No module named 'actors'"), "its node has no prismaquant-ray"),
    ],
    ids=["out of disk", "runtime environment", "unimportable"],
)
def test_what_every_worker_of_a_node_would_meet_ends_the_run_in_one_line(
    workers: Callable[..., RayWorkers], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    with pytest.raises(ResourceError) as caught:
        reply(workers(), error, monkeypatch)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exception_of_a_worker_arrives_as_what_it_was_and_where(
    workers: Callable[..., RayWorkers], monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = KeyError("model.layers.0.mamba.dt_proj")
    error = exceptions.RayTaskError("run", "a long traceback", cause)
    with pytest.raises(WorkerBugError) as caught:
        reply(workers(), error, monkeypatch)
    expected = "KeyError: 'model.layers.0.mamba.dt_proj' (backward run exit-00000, microbatch 0 on worker-0)"
    assert str(caught.value) == str(copy.copy(caught.value)) == expected
    assert caught.value.__cause__ is error, "the frames, for --debug"


@pytest.mark.parametrize("kind", [exceptions.ObjectLostError, exceptions.GetTimeoutError])
def test_what_cannot_be_fetched_is_no_lost_worker(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: object, timeout: float) -> None:
        raise kind("0" * 56, None, "driver") if kind is exceptions.ObjectLostError else kind(f"{timeout} s")

    monkeypatch.setattr(ray, "get", get)
    assert RayWorker().fetch_and_run(cast("Any", None), 0, ["a reference"]) == (None, None)


@pytest.mark.parametrize("alive", [True, False])
def test_the_loss_of_the_drivers_own_node_is_told_from_that_of_others(
    workers: Callable[..., RayWorkers], asked: Asked, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    nodes = [{"NodeID": "0", "NodeManagerHostname": "driver", "Alive": alive}]
    nodes += [{"NodeID": "1", "NodeManagerHostname": "other", "Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    if alive:
        assert reply(workers(), died(NODE_IS_GONE["node has died"]), monkeypatch).lost is not None
        return
    with pytest.raises(ResourceError, match="the driver's own Ray node, driver, is lost to the cluster"):
        reply(workers(), died(NODE_IS_GONE["node has died"]), monkeypatch)


@pytest.mark.parametrize("words", NODE_IS_GONE)
def test_the_words_for_a_lost_node_are_rays_own(words: str) -> None:
    """Ray has no type for it: the sentences are in the program that writes them."""
    program = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"
    sentence = NODE_IS_GONE[words]
    assert words in sentence
    assert sentence.strip().encode() in program.read_bytes()
