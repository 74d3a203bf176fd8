"""What is published is what was made: on a hub that stores what it is sent, and on a real S3 server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import HfApi, constants

from jobs.command_line import cli
from prismaquant_ray.errors import InputError, PrismaquantError, StoreError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.publishing import hub as publishing_hub
from prismaquant_ray.publishing.bucket import check_bucket, publish_to_bucket
from prismaquant_ray.publishing.finished import Published, open_finished
from prismaquant_ray.publishing.hub import check_hub, publish_to_hub
from prismaquant_ray.publishing.hub_client import HubRepository
from prismaquant_ray.repository.manifest import DEQUANTIZED, MANIFEST
from prismaquant_ray.source.files import CONFIG, INDEX
from prismaquant_ray.storage.hub_failures import tidy
from prismaquant_ray.storage.store import Store
from tests.fault_proxy import FaultProxy
from tests.hub_server import CUT, FINE, LOST, ORGANIZATION, READER, STRANGER, TOKEN, USER, HubServer
from tests.hub_server import Repository as HubRepositoryState
from tests.light import light
from tests.repositories import make_model, uniform
from tests.s3_server import S3Server

# The client's way of sending files is deprecated by the HTTP library under it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

NAME = f"{ORGANIZATION}/tiny-nvfp4"
TARGET = f"hf://{NAME}"
SHARD = 20_000


class Recorder:
    """A listener that remembers, and checks that a stage never ends beyond its bytes."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.stages: list[tuple[str, int]] = []
        self.moved: list[int] = []

    def begin(self, what: str, files: int, size: int) -> None:
        self.stages.append((what, size))
        self.moved.append(0)

    def advance(self, size: int) -> None:
        self.moved[-1] += size
        assert self.moved[-1] <= self.stages[-1][1]

    def done(self, name: str, what: str, size: int) -> None:
        self.files.append(name)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two repositories of one model; the second has more shards, and a file less."""
    directory = tmp_path_factory.mktemp("publishing")
    model = make_model(directory, "llama")
    source = model.source.store.path
    assert source is not None
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nA tiny model.\n")
    model.write(directory / "first", uniform(model.layout, FormatName.NVFP4), shard=SHARD)
    (source / "README.md").unlink()
    model.write(directory / "second", uniform(model.layout, FormatName.MXFP8), shard=SHARD)
    assert len(shards(directory / "second")) > len(shards(directory / "first")) > 2
    return directory / "first", directory / "second"


@pytest.fixture
def first(versions: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the first repository that a test may change."""
    return Path(shutil.copytree(versions[0], tmp_path / "first"))


@pytest.fixture
def second(versions: tuple[Path, Path]) -> Path:
    return versions[1]


def shards(repository: Path) -> list[str]:
    return sorted(path.name for path in repository.glob("*.safetensors"))


def content(repository: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in repository.iterdir()}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def change_manifest(repository: Path, **changes: object) -> None:
    manifest = json.loads((repository / MANIFEST).read_text())
    (repository / MANIFEST).write_text(json.dumps(manifest | changes))


# The hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client asks the hub, by LFS, with a token from the environment only, and does not rest between attempts."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    rest = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: rest(seconds / 100))


@pytest.fixture(params=[None, 10_000], ids=["basic", "multipart"])
def any_hub(request: pytest.FixtureRequest, online: None) -> Iterator[HubServer]:
    """A hub of either transfer."""
    with HubServer(part_bytes=request.param) as server:
        yield server


@pytest.fixture
def hub(online: None) -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def publish(
    repository: Path | str,
    hub: HubServer,
    target: str = TARGET,
    *,
    public: bool = False,
    seconds: float = 20,
    token: str | None = None,
) -> Published:
    """As the command does; whatever comes of it, nobody ever saw half a repository."""
    source, listener = open_finished(str(repository)), Recorder()
    remote = HubRepository(target, HfApi(endpoint=hub.endpoint, token=token), seconds=seconds)
    try:
        check_hub(source, remote, public=public)
        return publish_to_hub(source, source.digest(listener), remote, listener, public=public)
    finally:
        for state in hub.repositories.values():
            check_history(state, hub)


def check_history(state: HubRepositoryState, hub: HubServer) -> None:
    """Every commit of ours with a config.json has, with it, everything that its complete manifest names."""
    for commit in state.commits:
        if CONFIG in commit.files and commit.title != "files":
            manifest = json.loads(hub.blobs[commit.files[MANIFEST].sha256])
            assert manifest["complete"]
            assert {name: commit.files[name].size for name in manifest["files"]} == manifest["files"]


def refused(call: Callable[[], object], message: str, kind: type[PrismaquantError] = InputError) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value).strip()
    assert TOKEN not in str(caught.value)
    assert "X-Signature" not in str(caught.value)


def test_everything_arrives_privately_in_one_commit(first: Path, any_hub: HubServer, tmp_path: Path) -> None:
    result = publish(first, any_hub)
    assert any_hub.content(NAME) == content(first)
    state = any_hub.repositories[NAME]
    assert state.private
    assert [commit.changed for commit in state.commits[1:]] == [sorted(content(first))]
    assert set(result.sent) == set(content(first))
    assert (result.public, result.present, result.removed) == (False, (), ())
    # Another client gets the same.
    HfApi(endpoint=any_hub.endpoint).snapshot_download(NAME, local_dir=tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in content(first)} == content(first)


def test_a_second_run_sends_nothing_and_makes_no_commit(first: Path, hub: HubServer) -> None:
    publish(first, hub)
    before = len(hub.repositories[NAME].commits)
    hub.requests.clear()
    result = publish(first, hub)
    assert (result.sent, result.bytes_sent) == ((), 0)
    assert len(hub.repositories[NAME].commits) == before
    assert {method for method, _ in hub.requests} == {"GET", "HEAD"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [500, 503, 429, CUT, LOST])
def test_faults_that_pass_are_not_noticed(first: Path, any_hub: HubServer, kind: int) -> None:
    """Every path fails twice before it works."""
    seen: dict[tuple[str, str], int] = {}

    def fault(method: str, path: str) -> int | None:
        seen[method, path] = seen.get((method, path), 0) + 1
        return kind if seen[method, path] <= 2 else None

    any_hub.fault = fault
    publish(first, any_hub)
    assert any_hub.content(NAME) == content(first)
    titles = [commit.title for commit in any_hub.repositories[NAME].commits]
    assert len(titles) == 2  # no commit was made twice


def test_after_an_interruption_only_missing_blobs_are_sent(first: Path, any_hub: HubServer) -> None:
    weights = {digest((first / name).read_bytes()): name for name in shards(first)}
    arrived = list(weights)[:2]

    def out_of_order(method: str, path: str) -> int | None:
        return 507 if method == "PUT" and path.startswith("/lfs/") and path.split("/")[2] not in arrived else None

    any_hub.fault = out_of_order
    refused(lambda: publish(first, any_hub, seconds=0), "run the same command again to continue", StoreError)
    assert any_hub.blobs_received == arrived
    assert any_hub.content(NAME) == {}
    any_hub.fault = lambda *_: None
    any_hub.requests.clear()
    publish(first, any_hub)
    assert any_hub.content(NAME) == content(first)
    assert any_hub.blobs_received == list(weights)
    sent = {path.split("/")[2] for method, path in any_hub.requests if method == "PUT"}
    assert sent == set(weights) - set(arrived)


def command_line(repository: Path, hub: HubServer, **variables: str) -> tuple[list[str], dict[str, Any]]:
    """The command in a process of its own, and how to start it."""
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"} | variables
    command = [sys.executable, "-m", "jobs", "publish", str(repository), TARGET]
    return command, {"env": environment, "cwd": Path(__file__).parents[2]}


@pytest.mark.slow
def test_a_killed_process_is_continued_by_the_same_command(first: Path, hub: HubServer) -> None:
    weights = [digest((first / name).read_bytes()) for name in shards(first)]
    reached, go_on = threading.Event(), threading.Event()

    def wait_at_the_third(method: str, path: str) -> int | None:
        if method == "PUT" and path.endswith(weights[2]):
            reached.set()
            go_on.wait(60)
            return CUT
        return None

    hub.fault = wait_at_the_third
    command, options = command_line(first, hub, HF_HUB_DISABLE_XET="1")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
    assert reached.wait(60)
    process.kill()
    process.wait()
    go_on.set()
    hub.fault = lambda *_: None
    assert hub.blobs_received == weights[:2]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    assert "verified, private" in done.stdout
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines if " sent: " in line][-3:] == [MANIFEST, INDEX, CONFIG]
    assert hub.content(NAME) == content(first)
    assert hub.blobs_received == weights


def test_the_command_needs_no_torch(first: Path, hub: HubServer) -> None:
    _, options = command_line(first, hub, HF_HUB_DISABLE_XET="1")
    (published,) = light(("publish", first, TARGET, "--json"), environment=options["env"])
    assert json.loads(published)["verified"] == len(content(first))
    assert hub.content(NAME) == content(first)


@pytest.mark.slow
def test_the_native_uploader_stores_chunks_and_the_same_commit_follows(
    first: Path, online: None, tmp_path: Path
) -> None:
    pytest.importorskip("hf_xet")
    with HubServer(chunks=tmp_path / "chunks") as hub:
        for name in shards(first):
            hub._store((first / name).read_bytes(), lfs=True)  # the server cannot read chunks
        command, options = command_line(first, hub, HF_HUB_DISABLE_XET="0", HF_HOME=str(tmp_path / "home"))
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        assert hub.content(NAME) == content(first)
        check_history(hub.repositories[NAME], hub)
    assert not any("lfs" in path for _, path in hub.requests)
    weights = sum((first / name).stat().st_size for name in shards(first))
    assert sum(path.stat().st_size for path in (tmp_path / "chunks").rglob("*") if path.is_file()) > weights / 2


def test_bytes_that_change_on_their_way_are_noticed(first: Path, any_hub: HubServer) -> None:
    any_hub.flip = 1
    refused(lambda: publish(first, any_hub), "the object is not what its name says", StoreError)
    assert not {CONFIG, *shards(first)} & set(any_hub.content(NAME))
    publish(first, any_hub)
    assert any_hub.content(NAME) == content(first)


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00002"])
@pytest.mark.parametrize("replacing", [False, True])
def test_what_the_hub_lists_in_the_end_is_compared(
    first: Path, second: Path, hub: HubServer, replacing: bool, name: str
) -> None:
    if replacing:
        publish(first, hub)
    repository = second if replacing else first
    (wrong,) = (path.name for path in repository.glob(f"{name}*"))
    hub.after_commit = lambda _: hub.rot(NAME, wrong)
    refused(lambda: publish(repository, hub, public=True), f"{wrong}: the hub does not list what was sent", StoreError)
    assert hub.repositories[NAME].private
    hub.after_commit = lambda _: None
    assert publish(repository, hub).sent == (wrong,)
    assert hub.content(NAME) == content(repository)


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG])
def test_a_file_that_changed_at_the_hub_is_noticed_and_sent_again(first: Path, hub: HubServer, name: str) -> None:
    publish(first, hub)
    hub.rot(NAME, name)
    assert publish(first, hub).sent == (name,)
    assert hub.content(NAME) == content(first)


def test_a_repository_whose_config_was_removed_becomes_a_model_again(first: Path, hub: HubServer) -> None:
    publish(first, hub)
    state = hub.repositories[NAME]
    hub._commit(state, "files", {name: entry for name, entry in state.files.items() if name != CONFIG})
    assert publish(first, hub).sent == (CONFIG,)
    assert hub.content(NAME) == content(first)


def test_an_earlier_version_is_replaced_in_one_commit(first: Path, second: Path, hub: HubServer) -> None:
    publish(first, hub)
    entries = hub.repositories[NAME].files
    entries["figure.png"] = entries["tokenizer.json"]  # somebody else's
    before = len(hub.repositories[NAME].commits)
    result = publish(second, hub)
    assert len(hub.repositories[NAME].commits) == before + 1
    found = hub.content(NAME)
    del found["figure.png"]
    assert found == content(second)
    assert set(result.removed) == {*shards(first), "README.md"}
    assert "tokenizer.json" in result.present


def test_an_interrupted_upload_gives_way_to_another_version(first: Path, second: Path, hub: HubServer) -> None:
    hub.fault = lambda _, path: 501 if path.endswith("/commit/main") else None
    refused(lambda: publish(first, hub), "HTTP 501", StoreError)
    assert hub.content(NAME) == {}
    hub.fault = lambda *_: None
    publish(second, hub)
    assert hub.content(NAME) == content(second)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"pytorch_model.bin": b"weights"}, "holds something else (pytorch_model.bin)"),
        ({MANIFEST: b"[]", CONFIG: b"{}"}, "holds something else (its prismaquant.json is not a JSON object)"),
        ({MANIFEST: b'{"kind": "dequantized", "files": {}}', CONFIG: b"{}"}, "holds a dequantized repository"),
    ],
)
def test_other_content_is_left_alone(first: Path, hub: HubServer, there: dict[str, bytes], message: str) -> None:
    hub.make(NAME, there)
    refused(lambda: publish(first, hub), message)
    assert hub.content(NAME) == there
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


def test_decoded_weights_do_not_replace_a_quantized_repository(first: Path, hub: HubServer) -> None:
    publish(first, hub)
    change_manifest(first, kind=DEQUANTIZED)
    refused(lambda: publish(first, hub), "holds a quantized repository")


def test_somebody_elses_commit_meanwhile_is_not_overwritten(first: Path, second: Path, hub: HubServer) -> None:
    publish(first, hub)

    def meddle(method: str, path: str) -> int | None:
        state = hub.repositories[NAME]
        if method == "PUT" and len(state.commits) == 2:
            hub._commit(state, "theirs", state.files | {"theirs": state.files[".gitattributes"]})
        return None

    hub.fault = meddle
    refused(lambda: publish(second, hub), "was changed meanwhile", StoreError)
    assert hub.content(NAME).keys() - {"theirs"} == content(first).keys()
    publish(second, hub)
    assert hub.content(NAME).keys() - {"theirs"} == content(second).keys()


def test_it_is_public_only_when_asked_and_complete(first: Path, hub: HubServer) -> None:
    result = publish(first, hub, public=True)
    assert result.public
    assert not hub.repositories[NAME].private
    (created,) = (index for index, (_, path) in enumerate(hub.requests) if path == "/api/repos/create")
    (opened,) = (index for index, (_, path) in enumerate(hub.requests) if path.endswith("/settings"))
    assert created < max(index for index, (_, path) in enumerate(hub.requests) if "/commit/" in path) < opened


def test_a_public_target_needs_to_be_asked_for(first: Path, hub: HubServer) -> None:
    hub.make(NAME, {}, private=False)
    refused(lambda: publish(first, hub), "is public; add --public")
    assert hub.content(NAME) == {}
    assert publish(first, hub, public=True).public


def test_a_private_repository_becomes_public_on_request(first: Path, hub: HubServer) -> None:
    publish(first, hub)
    result = publish(first, hub, public=True)
    assert (result.public, result.sent) == (True, ())
    assert not hub.repositories[NAME].private


@pytest.mark.parametrize(
    ("token", "target", "message"),
    [
        ("hf_wrongwrongwrong", TARGET, "the token is not accepted"),
        (READER, TARGET, "may only read"),
        (TOKEN, "hf://others/model", f"this token may not make it: it is for {USER}, {ORGANIZATION}"),
        (FINE, "hf://others/model", "not permitted (HTTP 403: You don't have the rights to create a model"),
        (TOKEN, "hf://others/gated", "is gated and this account has no access"),
        (STRANGER, f"hf://{USER}/public", "not permitted (HTTP 403"),
    ],
)
def test_without_the_right_nothing_is_made(
    first: Path, hub: HubServer, token: str, target: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.make("others/gated", {"config.json": b"{}"}, private=False, gated=True)
    hub.make(f"{USER}/public", {}, private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    refused(lambda: publish(first, hub, target, public=target.endswith("public")), message)
    assert {name: hub.content(name) for name in hub.repositories} == {
        "others/gated": {"config.json": b"{}"},
        f"{USER}/public": {},
    }


def test_a_fine_grained_token_may_publish_for_its_organization(
    first: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", FINE)
    assert publish(first, hub).place.endswith(NAME)


def test_no_token_is_said_before_anything_is_asked(
    first: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused(lambda: publish(first, hub), "there is no Hugging Face token; hf auth login, or set HF_TOKEN")
    assert hub.requests == []


def test_offline_is_said(first: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: publish(first, hub), "(HF_HUB_OFFLINE is set); unset it to publish")


def test_a_hub_that_is_gone_is_said_after_bounded_retries(first: Path, online: None) -> None:
    with HubServer() as gone:
        pass
    refused(lambda: publish(first, gone, seconds=0.2), "the hub is not there (connection refused)", StoreError)


def test_messages_have_no_token_and_no_signature(online: None) -> None:
    said = f"{TOKEN} was sent to\nhttps://store/blob?X-Signature=secret and refused"
    assert tidy(said) == "… was sent to https://store/blob?… and refused"


@pytest.mark.parametrize("name", ["", "model", "a/b/c", "a/b--c", "a/b@main", "a/.b", "a b/c", "a/b.git"])
def test_a_bad_name_is_refused(name: str) -> None:
    refused(lambda: HubRepository(f"hf://{name}", HfApi()), "give hf://org/name")


def test_a_readme_that_the_hub_refuses_is_said_before_weights_are_sent(first: Path, hub: HubServer) -> None:
    text = "---\nlicense"
    (first / "README.md").write_text(text)
    manifest = json.loads((first / MANIFEST).read_text())
    digests = manifest["sha256"] | {"README.md": hashlib.sha256(text.encode()).hexdigest()}
    change_manifest(first, files=manifest["files"] | {"README.md": len(text)}, sha256=digests)
    refused(lambda: publish(first, hub), "front matter has no end")
    assert hub.blobs_received == []


def drop(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (MANIFEST, drop, f"has no {MANIFEST}, so it is no repository of this project"),
        (MANIFEST, cut, "is not JSON"),
        (CONFIG, drop, f"{CONFIG} is missing"),
        ("model-00002", drop, "is missing"),
        ("model-00002", cut, f"but {MANIFEST} says"),
        ("model-00002", flip, f"has other bytes than {MANIFEST} says"),
        ("tokenizer.json", flip, f"has other bytes than {MANIFEST} says"),
        ("config.json", flip, f"has other bytes than {MANIFEST} says"),
        ("tokenizer.json", cut, f"but {MANIFEST} says"),
    ],
)
def test_a_damaged_repository_is_not_sent(
    first: Path, hub: HubServer, name: str, damage: Callable[[Path], None], message: str
) -> None:
    (path,) = first.glob(f"{name}*")
    if name == MANIFEST and damage is cut:
        path.write_bytes(path.read_bytes().rstrip())
    damage(path)
    refused(lambda: publish(first, hub), message)
    assert {method for method, _ in hub.requests} <= {"GET"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "is not complete"),
        ({"schema": 99}, "of another version"),
        ({"sha256": {}}, "does not describe README.md"),
        ({"files": {}}, "does not describe README.md"),
        ({"files": {}, "sha256": {}}, "does not describe config.json"),
    ],
)
def test_a_manifest_that_does_not_describe_it_all_is_refused(
    first: Path, changes: dict[str, object], message: str
) -> None:
    change_manifest(first, **changes)
    refused(lambda: open_finished(str(first)), message)


def test_a_file_that_changes_between_checking_and_sending_is_noticed(first: Path) -> None:
    source = open_finished(str(first))
    file = next(file for file in source.digest(Recorder()) if file.name == shards(first)[0])
    taken, advanced = bytearray(), [0]
    source.copy(file, taken.extend, advanced.append)
    assert (bytes(taken), sum(advanced)) == ((first / file.name).read_bytes(), file.size)
    flip(first / file.name)
    refused(lambda: source.get(file), "changed while it was read", StoreError)
    advanced.clear()
    refused(lambda: source.copy(file, taken.extend, advanced.append), "changed while it was read", StoreError)
    assert (len(advanced), sum(advanced)) == (2, 0)


def test_a_manifest_cannot_name_files_elsewhere(first: Path) -> None:
    files = json.loads((first / MANIFEST).read_text())["files"]
    (first.parent / "secret").write_text("x")
    change_manifest(first, files=files | {"../secret": 1})
    refused(lambda: open_finished(str(first)), "names a file '../secret'")


# The command --------------------------------------------------------------------------------------------------------


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["publish", *map(str, arguments)])


def test_the_command_prints_one_object_or_a_summary(
    first: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, endpoint=hub.endpoint))
    (first / "notes.txt").write_text("mine")
    done = call(first, TARGET, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["place"] == f"{hub.endpoint}/{NAME}"
    assert result["unlisted"] == ["notes.txt"]
    assert result["verified"] == len(content(first)) - 1
    again = call(first, TARGET, "--public")
    assert again.exit_code == 0, again.output
    assert "verified, public; 0 sent" in again.stdout
    assert "not in prismaquant.json: notes.txt" in again.stdout
    assert TOKEN not in done.output + again.output


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("models/out", (), "is no place to publish at; give hf://org/name"),
        ("https://huggingface.co/a/b", (), "is no place to publish at"),
        ("hf://name", (), "hf://name names no owner; give hf://org/name"),
        ("hf://a/b/c", (), "is no name of a repository"),
        ("s3://", (), "names no bucket"),
        ("s3://bucket/x", ("--public",), "--public is for hf://"),
    ],
)
def test_a_bad_target_is_one_line_and_exit_code_2(
    first: Path, target: str, options: tuple[str, ...], message: str
) -> None:
    result = call(first, target, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


# S3 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(s3_server: S3Server) -> S3Server:
    s3_server.make_bucket("models")
    return s3_server


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with FaultProxy("127.0.0.1", server.port) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture
def prefix(proxy: FaultProxy) -> str:
    return f"s3://models/{uuid4().hex}/deep"


class Watch:
    """Names that were written, in order; answers with `refuse` when a name is in it."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.written: list[str] = []
        self.refuse: set[str] = set()
        self.before_read: Callable[[str], None] = lambda _: None
        proxy.intercept = self

    def __call__(self, method: str, target: str) -> tuple[int, str] | None:
        name = target.partition("?")[0].rpartition("/")[2]
        if method == "GET":
            self.before_read(name)
        if method not in ("PUT", "POST") or name.startswith(".prismaquant-probe"):
            return None
        if name in self.refuse:
            return 403, "AccessDenied"
        if method == "PUT":
            self.written.append(name)
        return None


def copy(repository: Path | str, target: str) -> Published:
    source, listener = open_finished(str(repository)), Recorder()
    check_bucket(source, target)
    return publish_to_bucket(source, source.digest(listener), target, listener)


def stored(target: str) -> dict[str, bytes]:
    store = Store(target)
    return {key: store.get(key) for key in store.list()}


@pytest.mark.s3
def test_in_a_bucket_everything_arrives_and_config_comes_last(first: Path, prefix: str, proxy: FaultProxy) -> None:
    watch = Watch(proxy)
    result = copy(first, prefix)
    assert stored(prefix) == content(first)
    assert watch.written[0] == MANIFEST  # the claim
    assert watch.written[-3:] == [MANIFEST, INDEX, CONFIG]
    assert set(result.sent) == set(content(first))
    watch.written.clear()
    again = copy(first, f"{prefix}/")
    assert (again.sent, again.bytes_sent) == ((), 0)
    assert watch.written == []


@pytest.mark.s3
def test_in_a_bucket_the_command_needs_no_torch(first: Path, prefix: str) -> None:
    (published,) = light(("publish", first, prefix, "--json"))
    assert json.loads(published)["verified"] == len(content(first))
    assert stored(prefix) == content(first)


@pytest.mark.s3
def test_in_a_bucket_an_interrupted_upload_continues(first: Path, prefix: str, proxy: FaultProxy) -> None:
    watch, names = Watch(proxy), shards(first)
    watch.refuse = {names[2]}
    refused(lambda: copy(first, prefix), "not permitted")
    assert not {CONFIG, INDEX, names[2]} & set(stored(prefix))
    watch.refuse.clear()
    watch.written.clear()
    result = copy(first, prefix)
    assert stored(prefix) == content(first)
    assert set(watch.written) == {*names[2:], *(MANIFEST, INDEX, CONFIG)}
    assert set(result.present) >= set(names[:2])


@pytest.mark.s3
def test_in_a_bucket_equal_size_is_not_equal_content(first: Path, prefix: str, proxy: FaultProxy) -> None:
    copy(first, prefix)
    wrong, store = shards(first)[0], Store(prefix)
    store.put(wrong, bytes(len(store.get(wrong))))
    watch = Watch(proxy)
    assert wrong in copy(first, prefix).sent
    assert stored(prefix) == content(first)
    assert set(watch.written) == {wrong, MANIFEST, INDEX, CONFIG}


@pytest.mark.s3
def test_in_a_bucket_bytes_that_changed_are_noticed_by_reading_them_back(
    first: Path, prefix: str, proxy: FaultProxy, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = shards(first)[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    beside = Store(prefix)  # not through the proxy
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    watch = Watch(proxy)

    def rot(name: str) -> None:
        if name == wrong:
            beside.put(name, bytes((first / name).stat().st_size))

    watch.before_read = rot
    refused(lambda: copy(first, prefix), f"{wrong} is not there as it was sent", StoreError)
    assert not {CONFIG, INDEX} & set(beside.list())
    watch.before_read = lambda _: None
    copy(first, prefix)
    assert stored(prefix) == content(first)


@pytest.mark.s3
def test_in_a_bucket_an_earlier_version_is_updated(first: Path, second: Path, prefix: str) -> None:
    copy(first, prefix)
    Store(prefix).put("figure.png", b"theirs")
    result = copy(second, prefix)
    assert stored(prefix) == content(second) | {"figure.png": b"theirs"}
    assert set(result.removed) == {*shards(first), "README.md"}


@pytest.mark.s3
def test_in_a_bucket_other_content_is_left_alone(first: Path, prefix: str, proxy: FaultProxy) -> None:
    Store(prefix).put("other.bin", b"x")
    watch = Watch(proxy)
    # Before the weights are read, and again before they are sent.
    refused(lambda: check_bucket(open_finished(str(first)), prefix), f"{prefix} holds something else (other.bin)")
    refused(lambda: publish_to_bucket(open_finished(str(first)), (), prefix, Recorder()), "holds something else")
    assert (stored(prefix), watch.written) == ({"other.bin": b"x"}, [])
    refused(lambda: copy(first, "s3://absent/x"), "the bucket does not exist")


@pytest.mark.s3
def test_from_a_bucket_to_a_bucket_and_to_the_hub(
    first: Path, prefix: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(first, prefix)
    copy(prefix, f"{prefix}-copy")
    assert stored(f"{prefix}-copy") == content(first)
    refused(lambda: copy(prefix, f"{prefix}/"), "are one place")
    refused(lambda: copy(prefix, f"{prefix}/inside"), "one lies in the other")
    # Shards count as large: they pass through this machine's disk.
    monkeypatch.setattr(publishing_hub, "PIECE", 1000)
    publish(prefix, hub)
    assert hub.content(NAME) == content(first)
