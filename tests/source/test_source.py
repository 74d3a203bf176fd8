"""A model on the hub is fetched into the cache of this machine: the revision asked for, and only what is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from prismaquant_ray.errors import InputError
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.resolve import resolve
from tests.hub_server import HubServer
from tests.tiny import make_checkpoint

NAME = "somebody/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The hub as `huggingface_hub` finds it, and a cache with nothing in it."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join((server.endpoint, *files[1:])))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def files(directory: Path, seed: int) -> dict[str, bytes]:
    made = make_checkpoint(directory, "llama", seed=seed, shards=2)
    return {path.name: path.read_bytes() for path in made.iterdir()}


def test_a_revision_is_fetched_once_and_without_what_nobody_reads(tmp_path: Path, hub: HubServer) -> None:
    first, second = files(tmp_path / "first", 1), files(tmp_path / "second", 2)
    hub.make(NAME, first | {"pytorch_model.bin": b"a pickle", "consolidated.00.pth": b"another"}, private=False)
    (_, made) = hub.repositories[NAME].commits
    hub.replace(NAME, second)
    store = resolve(NAME, made.id)
    assert {key: store.get(key) for key in store.list()} == first
    assert Checkpoint(store).config["model_type"] == "llama"
    asked = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(asked) == len(set(asked)) == len(first)
    assert resolve(NAME, made.id).path == store.path
    assert [path for method, path in hub.requests if method == "GET" and "/resolve/" in path] == asked
    newest = resolve(NAME, "main")
    assert {key: newest.get(key) for key in newest.list()} == second
    assert newest.path != store.path


def test_what_was_fetched_is_there_without_the_hub(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.make(NAME, files(tmp_path / "made", 1), private=False)
    store = resolve(NAME, "main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert resolve(NAME, "main").path == store.path
    assert hub.requests == []


@pytest.mark.parametrize(("name", "revision"), [(NAME, "nonsense"), ("somebody/else", "main"), ("a b", "main")])
def test_what_the_hub_does_not_have_is_one_line(tmp_path: Path, hub: HubServer, name: str, revision: str) -> None:
    hub.make(NAME, files(tmp_path / "made", 1), private=False)
    with pytest.raises(InputError, match=f"model.source {name} .*revision {revision}"):
        resolve(name, revision)
