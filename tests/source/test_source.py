"""A model whose weights this machine's cache has is read from there, and nothing else of it is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from prismaquant_ray.errors import InputError
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.resolve import pinned, resolve
from tests.hub_server import HubServer, reach
from tests.tiny import make_checkpoint

NAME = "somebody/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The hub as `huggingface_hub` finds it, and a cache with nothing in it."""
    with HubServer() as server:
        reach(server, monkeypatch, tmp_path)
        yield server


def files(directory: Path, seed: int) -> dict[str, bytes]:
    made = make_checkpoint(directory, "llama", seed=seed, shards=2)
    return {path.name: path.read_bytes() for path in made.iterdir()}


def test_weights_in_the_cache_are_a_directory_and_not_fetched_again(tmp_path: Path, hub: HubServer) -> None:
    first, second = files(tmp_path / "first", 1), files(tmp_path / "second", 2)
    hub.make(NAME, first | {"pytorch_model.bin": b"a pickle", "consolidated.00.pth": b"another"}, private=False)
    (_, made) = hub.repositories[NAME].commits
    hub.replace(NAME, second)
    snapshot_download(NAME, revision=made.id, allow_patterns=["*.safetensors"])
    hub.requests.clear()
    store = resolve(NAME, made.id)
    assert store.path is not None
    assert pinned(NAME, made.id, store) == made.id
    assert {key: store.get(key) for key in store.list()} == first
    assert Checkpoint(store).config["model_type"] == "llama"
    asked = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert {path.rpartition("/")[2] for path in asked} == {name for name in first if "safetensors" not in name[-11:]}
    assert len(asked) == len(set(asked))
    assert resolve(NAME, made.id).path == store.path
    assert [path for method, path in hub.requests if method == "GET" and "/resolve/" in path] == asked
    assert resolve(NAME, "main").path is None


def test_what_was_fetched_is_there_without_the_hub(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.make(NAME, files(tmp_path / "made", 1), private=False)
    path = Path(snapshot_download(NAME))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    store = resolve(NAME, "main")
    assert store.path == path
    assert pinned(NAME, "main", store) == hub.repositories[NAME].commits[-1].id
    assert hub.requests == []


def test_while_the_hub_is_down_the_cache_is_read_and_that_is_said(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prismaquant_ray.source.hub.OPENING_SECONDS", 0.1)
    hub.make(NAME, files(tmp_path / "made", 1), private=False)
    path = Path(snapshot_download(NAME))
    hub.fault = lambda *_: 503
    said: list[str] = []
    assert resolve(NAME, "main", said.append).path == path
    assert len(said) == 1
    assert "HTTP 503" in said[0]
    assert "cache" in said[0]


@pytest.mark.parametrize(("name", "revision"), [(NAME, "nonsense"), ("somebody/else", "main"), ("a b", "main")])
@pytest.mark.parametrize("offline", [False, True])
def test_what_the_hub_does_not_have_is_one_line(
    tmp_path: Path, hub: HubServer, name: str, revision: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.make(NAME, {"config.json": b"{}"}, private=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(InputError, match=f"model.source {name} on") as caught:
        resolve(name, revision)
    assert "\n" not in str(caught.value)
    assert revision in str(caught.value) or name == "a b"
