"""A model on the hub is read where it is: which bytes are asked for, of whom, and what a failure does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

from prismaquant_ray.errors import InputError, PrismaquantError, StoreError
from prismaquant_ray.parsing import MalformedError
from prismaquant_ray.source import hub_ranges
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.hub import HubFiles, commit_of
from prismaquant_ray.source.hub_ranges import NoRangesError
from prismaquant_ray.source.resolve import pinned, resolve
from prismaquant_ray.storage import retry
from prismaquant_ray.storage.store import Store
from tests.hub_cdn import Cdn
from tests.hub_server import LOST, ORGANIZATION, READER, STRANGER, HubServer, reach
from tests.tiny import make_checkpoint

NAME = f"{ORGANIZATION}/tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "model", "llama", hidden=128, intermediate=512, shards=2)


@pytest.fixture
def cdn() -> Iterator[Cdn]:
    with Cdn() as running:
        yield running


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, cdn: Cdn) -> Iterator[HubServer]:
    """A hub with the model in a private repository, a token that may read it, and a server of its own for weights."""
    with HubServer() as server:
        reach(server, monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", READER)
        server.make(NAME, {path.name: path.read_bytes() for path in model.iterdir()})
        server.cdn = cdn
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that retries would have waited."""
    found: list[float] = []

    def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    return found


def opened(seconds: float = 60.0) -> HubFiles:
    return HubFiles(commit_of(NAME, "main", place="here"), seconds=seconds)


def answering(status: int, times: int = 1000) -> Callable[..., int | None]:
    """A fault: this status, so many times."""
    left = iter([status] * times)
    return lambda *_: next(left, None)


def whole(files: HubFiles, name: str = SHARDS[0]) -> bytes:
    size = files.size(name)
    assert size is not None
    return bytes(files.get_ranges(name, [(0, size)])[0])


# What is read ----------------------------------------------------------------------------------------------------


def test_a_model_is_one_and_the_same_by_ranges_as_a_snapshot_and_as_a_copy(model: Path, hub: HubServer) -> None:
    by_ranges = resolve(NAME, "main")
    assert by_ranges.path is None
    read = Checkpoint(by_ranges)
    snapshot = Checkpoint(Store(snapshot_download(NAME)))
    copy = Checkpoint(Store(model))
    assert read.fingerprint() == snapshot.fingerprint() == copy.fingerprint()
    assert read.tensors == snapshot.tensors == copy.tensors
    assert read.config == copy.config
    ours, theirs = read.read(read.tensors), copy.read(copy.tensors)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert read.other_files() == copy.other_files()
    assert all(by_ranges.get(name) == copy.store.get(name) for name in copy.other_files())


def test_opening_reads_the_headers_and_nothing_else(model: Path, hub: HubServer, cdn: Cdn) -> None:
    Checkpoint(resolve(NAME, "main"))
    lengths = {name: int.from_bytes((model / name).read_bytes()[:8], "little") for name in SHARDS}
    headers = [span for name in SHARDS for span in ((name, 0, 8), (name, 8, 8 + lengths[name]))]
    asked = sorted((sent.file, sent.start, sent.stop) for sent in cdn.sent)
    assert asked == sorted([(SHARDS[0], 0, 8), *headers])
    # The hub itself was asked once for each file of weights.
    assert cdn.links == len(SHARDS)
    assert sum(sent.nbytes for sent in cdn.sent) < 0.01 * sum((model / name).stat().st_size for name in SHARDS)
    cache = Path(constants.HF_HUB_CACHE)
    assert {path.name for path in cache.rglob("snapshots/*/*")} == {"config.json", "model.safetensors.index.json"}


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub: HubServer, cdn: Cdn) -> None:
    files = opened()
    whole(files)
    whole(files)
    assert cdn.sent
    assert {sent.token for sent in cdn.sent} == {None}
    # It did arrive at the hub: without it the repository is not there.
    hub.cdn = None
    assert whole(opened())


def spans(random: Random, size: int) -> list[tuple[int, int]]:
    starts = [random.randrange(size) for _ in range(random.randrange(1, 12))]
    return [(start, min(size, start + random.choice((0, 1, 300, 9000)))) for start in starts]


@pytest.mark.parametrize("seed", range(4))
def test_any_ranges_are_the_bytes_of_the_file_in_few_requests(
    seed: int, model: Path, hub: HubServer, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_ranges, "REQUEST_BYTES", 4000)
    monkeypatch.setattr(hub_ranges, "GAP_BYTES", 500)
    data, random, files = (model / SHARDS[0]).read_bytes(), Random(seed), opened()
    for _ in range(5):
        cdn.sent.clear()
        wanted = spans(random, len(data))
        assert [bytes(found) for found in files.get_ranges(SHARDS[0], wanted)] == [data[a:b] for a, b in wanted]
        assert all(sent.nbytes <= 4000 for sent in cdn.sent)
        ends = sorted((sent.start, sent.stop) for sent in cdn.sent)
        # Two requests are not one because there is a gap between them, or because they would be too large.
        assert all(after[0] > before[1] + 500 or after[1] - before[0] > 4000 for before, after in pairwise(ends))


def test_a_range_beyond_the_file_is_refused_unasked(hub: HubServer, cdn: Cdn) -> None:
    files = opened()
    with pytest.raises(StoreError, match="shorter than its header says"):
        files.get_ranges(SHARDS[0], [(0, (files.size(SHARDS[0]) or 0) + 1)])
    assert cdn.sent == []


def test_what_is_missing_or_too_large_is_as_of_any_store(hub: HubServer) -> None:
    files = opened()
    assert files.size("nothing.json") is None
    with pytest.raises(KeyError):
        files.get("nothing.json")
    with pytest.raises(KeyError):
        files.get_ranges("nothing.safetensors", [(0, 1)])
    with pytest.raises(MalformedError, match="at most 10 are read"):
        files.get("config.json", 10)
    assert not [path for _, path in hub.requests if path.endswith("config.json")]


# The cache --------------------------------------------------------------------------------------------------------


def test_a_file_in_the_cache_is_read_from_there_and_the_others_by_ranges(model: Path, hub: HubServer, cdn: Cdn) -> None:
    hf_hub_download(NAME, SHARDS[0])
    checkpoint = Checkpoint(resolve(NAME, "main"))
    checkpoint.read(checkpoint.tensors)
    assert {sent.file for sent in cdn.sent} == {SHARDS[1]}


def test_a_cache_that_is_tidied_on_the_way_is_made_up_for(model: Path, hub: HubServer, cdn: Cdn) -> None:
    hf_hub_download(NAME, SHARDS[0])
    files = opened()
    config = files.get("config.json")
    assert cdn.sent == []
    for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*"):
        path.unlink()
    assert whole(files) == (model / SHARDS[0]).read_bytes()
    assert files.get("config.json") == config
    assert cdn.sent


def test_weights_that_a_new_commit_left_alone_are_not_read_again(model: Path, hub: HubServer, cdn: Cdn) -> None:
    snapshot_download(NAME, allow_patterns=["*.safetensors", "*.json"])
    hub.replace(NAME, {path.name: path.read_bytes() for path in model.iterdir()} | {"README.md": b"new"})
    cdn.whole.clear()
    store = resolve(NAME, "main")
    assert store.path is not None
    assert store.path.name == hub.repositories[NAME].commits[-1].id
    assert store.get("README.md") == b"new"
    assert cdn.whole == []
    assert cdn.sent == []


def test_a_file_of_another_size_in_the_cache_is_not_taken_for_the_hubs(hub: HubServer, cdn: Cdn) -> None:
    path = Path(hf_hub_download(NAME, SHARDS[0]))
    expected = path.read_bytes()
    path.write_bytes(expected[:-1])
    assert whole(opened()) == expected
    assert cdn.sent


def test_the_commit_is_the_one_that_was_opened(model: Path, hub: HubServer) -> None:
    files = resolve(NAME, "main")
    commit = pinned(NAME, "main", files)
    hub.replace(NAME, {"config.json": b"{}"})
    assert commit == hub.repositories[NAME].commits[-2].id
    assert whole(HubFiles(commit_of(NAME, commit, place="here"))) == (model / SHARDS[0]).read_bytes()


# Links ------------------------------------------------------------------------------------------------------------


def test_a_link_that_expires_is_asked_for_again(model: Path, hub: HubServer, cdn: Cdn) -> None:
    cdn.uses = 2
    files = opened()
    data = (model / SHARDS[0]).read_bytes()
    for start in range(0, 70, 10):
        assert bytes(files.get_ranges(SHARDS[0], [(start, start + 10)])[0]) == data[start : start + 10]
    assert cdn.links == 4
    assert cdn.refused == 3


def test_a_link_that_never_works_is_an_error_at_once(hub: HubServer, cdn: Cdn, pauses: list[float]) -> None:
    files = opened()
    whole(files)
    cdn.uses, made = 0, cdn.links
    cdn.expire()
    with pytest.raises(StoreError, match="refuses a link that the hub has just made") as caught:
        whole(files)
    assert cdn.links == made + 1
    assert cdn.refused == 2
    assert pauses == []
    assert "127.0.0.1" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "location", ["ftp://127.0.0.1/weights", "file:///etc/passwd", "http://[", "http://a:99999/", ""]
)
def test_a_redirect_leads_to_http_or_nowhere(location: str, hub: HubServer) -> None:
    files = opened()
    hub.cdn = None
    hub.fault = answering(302)
    hub.answer_with = {"Location": location}
    with pytest.raises(StoreError, match="redirects to no HTTP address"):
        whole(files)


def test_redirects_without_end_are_an_error(hub: HubServer, pauses: list[float]) -> None:
    files = opened()
    hub.requests.clear()
    hub.fault = answering(307)
    hub.answer_with = {"Location": f"/{NAME}/resolve/main/again"}
    with pytest.raises(StoreError, match="more than 5 redirects"):
        whole(files)
    assert len(hub.requests) == 6
    assert pauses == []


# Failures ---------------------------------------------------------------------------------------------------------


def test_an_answer_cut_short_is_asked_for_again(model: Path, hub: HubServer, cdn: Cdn, pauses: list[float]) -> None:
    cdn.short = 2
    assert whole(opened()) == (model / SHARDS[0]).read_bytes()
    assert len(pauses) == 2


def test_an_answer_that_never_ends_is_given_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_ranges, "_LONGEST", -1.0)
    with pytest.raises(StoreError, match="it took longer than"):
        whole(opened(seconds=0.1))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(status: int, model: Path, hub: HubServer, cdn: Cdn, pauses: list[float]) -> None:
    cdn.fault = answering(status, times=2)
    assert whole(opened()) == (model / SHARDS[0]).read_bytes()
    assert len(pauses) == 2


@pytest.mark.parametrize("headers", [{"Retry-After": "7"}, {"ratelimit": '"resolvers";r=0;t=7'}])
def test_a_server_is_not_asked_before_it_wants_to_be(
    headers: dict[str, str], model: Path, hub: HubServer, cdn: Cdn, pauses: list[float]
) -> None:
    cdn.fault = answering(429, times=1)
    cdn.answer_with = headers
    assert whole(opened()) == (model / SHARDS[0]).read_bytes()
    assert pauses == [7.0]


def test_a_server_that_wants_longer_than_retries_last_is_an_error(
    hub: HubServer, cdn: Cdn, pauses: list[float]
) -> None:
    files = opened()
    cdn.fault = answering(503)
    cdn.answer_with = {"Retry-After": "61"}
    with pytest.raises(StoreError, match=r"cannot be read \(the hub answers HTTP 503\)") as caught:
        whole(files)
    assert pauses == []
    assert "127.0.0.1" not in str(caught.value)
    assert len(cdn.sent) == 0


def test_no_answer_is_an_error_after_the_retries(hub: HubServer) -> None:
    files = opened(seconds=0.3)
    hub.cdn = None
    hub.fault = answering(LOST)
    with pytest.raises(StoreError, match="cut the connection") as caught:
        whole(files)
    assert "127.0.0.1" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("bytes 0-7/{other}", "has .* bytes, the hub lists"),
        ("bytes 1-8/{size}", "other bytes than asked for"),
        ("bytes 0-6/{size}", "other bytes than asked for"),
        ("bytes 0-7/*", "other bytes than asked for"),
    ],
)
def test_an_answer_about_other_bytes_is_an_error(
    place: str, said: str, hub: HubServer, cdn: Cdn, pauses: list[float]
) -> None:
    files = opened()
    size = files.size(SHARDS[0]) or 0
    cdn.answer_with = {"Content-Range": place.format(size=size, other=size + 1)}
    with pytest.raises(StoreError, match=said):
        files.get_ranges(SHARDS[0], [(0, 8)])
    assert pauses == []


@pytest.mark.parametrize("where", ["hub", "cdn"])
def test_a_server_without_ranges_sends_a_snapshot_and_that_is_said(
    where: str, model: Path, hub: HubServer, cdn: Cdn
) -> None:
    if where == "hub":
        hub.cdn, hub.answers_ranges = None, False
    cdn.answers_ranges = False
    said: list[str] = []
    store = resolve(NAME, "main", said.append)
    assert store.path is not None
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }
    assert len(said) == 1
    assert "does not answer byte ranges" in said[0]
    assert resolve(NAME, "main", said.append).path == store.path
    assert len(said) == 1


def test_a_server_that_stops_to_answer_ranges_is_an_error(hub: HubServer, cdn: Cdn) -> None:
    files = opened()
    whole(files)
    cdn.answers_ranges = False
    with pytest.raises(NoRangesError, match=f"hf download {NAME}"):
        whole(files)


@pytest.mark.parametrize(
    ("token", "gated", "said"),
    [
        ("", False, "set HF_TOKEN, or run hf auth login"),
        (STRANGER, False, "no such repository"),
        (STRANGER, True, f"gated.* accept the terms at .*/{NAME} and set HF_TOKEN"),
    ],
)
def test_what_this_account_may_not_read_says_what_to_do(
    token: str, gated: bool, said: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    repository = hub.repositories[NAME]
    repository.gated, repository.private = gated, not gated
    with pytest.raises(InputError, match=said) as caught:
        resolve(NAME, "main")
    assert "\n" not in str(caught.value)
    assert pauses == []


def test_access_that_is_lost_on_the_way_says_what_to_do(hub: HubServer, cdn: Cdn) -> None:
    files = opened()
    hub.fault = answering(403)
    with pytest.raises(InputError, match="shows this account no such repository"):
        whole(files)


@pytest.mark.parametrize(
    "listed",
    [
        {"sha": "../../elsewhere"},
        {"sha": None},
        {"siblings": [{"rfilename": "../x.json", "size": 3}]},
        {"siblings": [{"rfilename": "/etc/x.json", "size": 3}]},
        {"siblings": [{"rfilename": "x.json", "size": -1}]},
        {"siblings": [{"rfilename": "x.json", "size": "3"}]},
        {"siblings": [{"rfilename": "x.json"}]},
        {
            "siblings": [
                {"rfilename": "x.safetensors", "size": 3, "lfs": {"size": 3, "sha256": "../x", "pointerSize": 1}}
            ]
        },
        {"siblings": [{"size": 3}]},
        {"siblings": 3},
    ],
    ids=json.dumps,
)
def test_a_list_that_no_hub_makes_is_refused(
    listed: dict[str, object], hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.repositories[NAME].commits[-1].id
    body = {"id": NAME, "sha": commit, "siblings": [], "private": False} | listed
    monkeypatch.setattr(hub, "_info", lambda *_, **__: body)
    with pytest.raises(PrismaquantError, match="the hub") as caught:
        commit_of(NAME, "main", place="here")
    assert "\n" not in str(caught.value)
