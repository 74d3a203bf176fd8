"""A store keeps its promises on a directory and on a real S3 server, also when that server misbehaves."""

from __future__ import annotations

import os
import pickle
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from prismaquant_ray.errors import InputError, PrismaquantError, StoreError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.repository.manifest import MANIFEST
from prismaquant_ray.repository.staging import StagedPrefix, check_output, staged_output
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.repository.writer import WrittenRepository, write_repository
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.files import CONFIG, INDEX
from prismaquant_ray.storage import store as storage
from prismaquant_ray.storage.connection import absolute, local_path
from prismaquant_ray.storage.store import PART_BYTES, Store
from tests.fault_proxy import FaultProxy
from tests.repositories import Choice, Model, make_model, mixed, uniform
from tests.s3_server import ACCESS_KEY, READER_KEY, READER_SECRET, SECRET_KEY, S3Server, environment

BUCKET = "pqtest"
#: two whole parts and a bit
LARGE = random.Random(0).randbytes(2 * PART_BYTES + 12_345)


@pytest.fixture(scope="module")
def server(s3_server: S3Server) -> S3Server:
    s3_server.make_bucket(BUCKET)
    return s3_server


def use(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """These credentials and no others."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix."""
    use(monkeypatch, server.environment)
    return f"s3://{BUCKET}/{uuid4().hex}/deep"


@pytest.fixture
def proxy(server: S3Server, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", server.port, seed=7) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of either kind."""
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path / "store")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For outages that do not end."""
    monkeypatch.setattr(storage, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(storage, "CHECK_SECONDS", 1.0)


# What every store promises --------------------------------------------------------------------------------------


def test_what_was_put_is_got(place: str) -> None:
    store = Store(place)
    for data in (b"", b"x", bytes(range(256)) * 40):
        store.put("a/b", data)
        assert (store.get("a/b"), store.size("a/b")) == (data, len(data))
    assert store.list() == ["a/b"]


@pytest.mark.parametrize("size", [PART_BYTES, PART_BYTES + 1, len(LARGE)])
def test_large_objects_arrive_whole(size: int, place: str) -> None:
    store = Store(place)
    store.put("large", memoryview(LARGE)[:size])
    assert store.get("large") == LARGE[:size]
    assert [bytes(part) for part in store.get_ranges("large", [(5, 5), (PART_BYTES - 1, PART_BYTES), (0, 3)])] == [
        b"",
        LARGE[PART_BYTES - 1 : PART_BYTES],
        LARGE[:3],
    ]


def test_absent_objects_are_named_by_key(place: str) -> None:
    store = Store(place)
    store.put("there", b"x")
    assert store.size("nothing") is None
    for read in (store.get, lambda key: store.get_ranges(key, [(0, 1)])):
        with pytest.raises(KeyError, match="nothing"):
            read("nothing")
    store.delete(["nothing", "there", "nor this"])
    store.delete([])
    assert store.list() == []


def test_lists_are_relative_sorted_and_by_whole_segments(place: str) -> None:
    store = Store(place)
    for key in ("b/2", "b/1/x", "a", "bb/1"):
        store.put(key, b"")
    assert store.list() == ["a", "b/1/x", "b/2", "bb/1"]
    assert store.list("b") == ["b/1/x", "b/2"]
    assert store.list("nothing") == []
    inner = Store(f"{place}/b")
    assert inner.list() == ["1/x", "2"]
    assert inner.get("1/x") == b""


def test_many_are_deleted(place: str) -> None:
    store = Store(place)
    keys = [f"k/{number}" for number in range(30)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), [*keys, "kept"]))
    store.delete(iter(keys))
    assert store.list() == ["kept"]


def test_the_first_creator_wins(place: str) -> None:
    store = Store(place)
    assert store.create("record", b"one") is True
    assert store.create("record", b"two") is False
    assert store.create("record", b"one") is False
    assert store.get("record") == b"one"


def test_of_sixteen_creators_one_wins(place: str) -> None:
    store = Store(place)
    barrier = threading.Barrier(16)

    def create(number: int) -> bool:
        barrier.wait()
        return store.create("record", b"%d" % number)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert store.get("record") == b"%d" % won.index(True)


def test_a_stream_appears_at_its_end(place: str) -> None:
    store = Store(place)
    with store.open_writer("stream") as writer:
        for start in range(0, len(LARGE), 1_000_000):
            writer.write(LARGE[start : start + 1_000_000])
            assert store.size("stream") is None
    assert store.get("stream") == LARGE


def test_a_buffer_may_be_used_again_once_it_was_written(place: str) -> None:
    store, buffer = Store(place), bytearray(PART_BYTES)
    with store.open_writer("stream") as writer:
        for byte in b"abcdef":
            buffer[:] = bytes([byte]) * PART_BYTES
            writer.write(buffer)
    data = store.get("stream")
    assert len(data) == 6 * PART_BYTES
    assert all(data.count(byte) == PART_BYTES for byte in b"abcdef")


@pytest.mark.parametrize("size", [0, 10, len(LARGE)])
def test_a_stream_that_raises_leaves_nothing(size: int, place: str) -> None:
    store = Store(place)
    store.put("kept", b"old")
    for key in ("new", "kept"):
        with pytest.raises(ValueError, match="stop"), store.open_writer(key) as writer:
            writer.write(LARGE[:size])
            raise ValueError("stop")
    assert store.list() == ["kept"]
    assert store.get("kept") == b"old"


def test_errors_of_the_producer_end_an_upload(place: str) -> None:
    store, calls = Store(place), []

    def produce(writer: storage.ByteWriter) -> None:
        calls.append(writer.write(b"x"))
        raise StoreError("another store failed")

    with pytest.raises(StoreError, match="another store failed"):
        store.upload("key", produce)
    assert (len(calls), store.list()) == (1, [])


def test_usable_places_pass_the_checks_and_stay_as_they_were(place: str, tmp_path: Path) -> None:
    store = Store(place)
    store.check_readable()
    store.check_writable()
    assert store.list() == []
    assert list(tmp_path.rglob("*")) == ([tmp_path / "store"] if store.path else [])


def test_a_pickle_opens_the_same_place(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(place).put("a", b"x")
    if not place.startswith("s3"):
        monkeypatch.chdir(tmp_path)
        place = "store"
    pickled = pickle.dumps(Store(place))
    monkeypatch.chdir("/")
    assert pickle.loads(pickled).get("a") == b"x"  # noqa: S301


# Places ---------------------------------------------------------------------------------------------------------


def test_absolute_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("run") == absolute(Path("run")) == str(tmp_path / "run")
    assert absolute("file:///data/run") == absolute("/data/run") == "/data/run"
    assert absolute("s3://bucket/run/") == "s3://bucket/run"
    assert local_path("gs://bucket/run") is None


@pytest.mark.s3
def test_a_bucket_itself_is_a_place(server: S3Server, s3: str) -> None:
    store = Store(server.make_bucket("pq-root"))
    store.put("top", b"1")
    store.put("in/side", b"2")
    assert store.list() == ["in/side", "top"]
    store.check_writable()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://bucket/x", "ftp:// is not supported"),
        ("s3a://bucket/x", "s3a:// is not supported"),
        ("s3://AKIAKEY:hunter2/x@bucket/x", "without credentials"),
        ("s3://AKIAKEY:hunter2@bucket/x", "without credentials"),
        ("gs://user@bucket/x", "without credentials"),
        ("s3://bucket/x?secret=hunter2", "without credentials"),
        ("s3://bucket/x#hunter2", "without credentials"),
        ("s3://bucket:9000/x", "without credentials, port"),
        ("s3:/bucket/x", "two slashes"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("gs://b", "names no bucket"),
        ("s3://bucket/a//b", "empty, '.' or '..'"),
        ("s3://bucket/../b", "empty, '.' or '..'"),
    ],
)
def test_uris_that_name_no_place_are_refused(uri: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Store(uri)
    assert message in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert "hunter2" not in shown
    assert "AKIAKEY" not in shown


@pytest.mark.parametrize(
    "endpoint", ["localhost:9000", "http://user:hunter2@host", "https://host?x=hunter2", "http://"]
)
def test_endpoints_that_are_none_are_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, environment(endpoint))
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL must be") as caught:
        Store("s3://bucket/x")
    assert "hunter2" not in str(caught.value)


def test_google_stores_open_without_asking_anybody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, {})
    store = Store("gs://bucket/run")
    assert (store.path, repr(store)) == (None, "Store('gs://bucket/run')")
    assert repr(pickle.loads(pickle.dumps(store))) == repr(store)  # noqa: S301
    for text in (None, "{}", '{"private_key": "hunter2"'):
        key = tmp_path / f"{text and len(text)}.json"
        if text is not None:
            key.write_text(text)
        for variable in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"):
            use(monkeypatch, {variable: str(key)})
            with pytest.raises(InputError, match="cannot be opened with these settings") as caught:
                Store("gs://bucket/run")
            assert "hunter2" not in str(caught.value)


def test_profiles_need_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"AWS_PROFILE": "research"})
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "obstore.auth.boto3", raising=False)
    with pytest.raises(InputError, match=r"AWS_PROFILE is research.*pip install boto3"):
        Store("s3://bucket/x")


@pytest.mark.s3
@pytest.mark.parametrize("known", [True, False])
def test_profiles_are_read_by_boto3(known: bool, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "research")
    frozen = SimpleNamespace(access_key=ACCESS_KEY, secret_key=SECRET_KEY, token=None)
    credentials = SimpleNamespace(get_frozen_credentials=lambda: frozen)

    class Session:
        region_name = "us-east-1"

        def get_credentials(self) -> SimpleNamespace | None:
            return credentials if known else None

    modules = {name: ModuleType(name) for name in ("boto3", "boto3.session", "botocore", "botocore.exceptions")}
    modules["botocore.credentials"] = ModuleType("botocore.credentials")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    monkeypatch.setattr(modules["boto3"], "Session", Session, raising=False)
    monkeypatch.setattr(modules["botocore.exceptions"], "BotoCoreError", type("E", (Exception,), {}), raising=False)
    try:
        if known:
            Store(s3).put("a", b"x")
            assert Store(s3).get("a") == b"x"
        else:
            with pytest.raises(InputError, match="AWS_PROFILE research: no such profile"):
                Store(s3)
    finally:
        sys.modules.pop("obstore.auth.boto3", None)


# Refusals -------------------------------------------------------------------------------------------------------


def operations(store: Store) -> dict[str, Callable[[], object]]:
    def stream() -> None:
        with store.open_writer("key") as writer:
            writer.write(LARGE)

    return {
        "check_readable": store.check_readable,
        "check_writable": store.check_writable,
        "get": lambda: store.get("key"),
        "get_ranges": lambda: store.get_ranges("key", [(0, 1)]),
        "put": lambda: store.put("key", b"x"),
        "put large": lambda: store.put("key", LARGE),
        "create": lambda: store.create("key", b"x"),
        "open_writer": stream,
        "list": store.list,
        "delete": lambda: store.delete(["key"]),
    }


def failure(kind: type[PrismaquantError], operation: Callable[[], object], *secrets: str) -> str:
    """The message: one line, not long, and without secrets, as is the whole traceback."""
    with pytest.raises(kind) as caught:
        operation()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 300
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # noqa: S301
    shown = repr(caught.value) + "".join(traceback.format_exception(caught.value, chain=True))
    for secret in (ACCESS_KEY, SECRET_KEY, *secrets):
        assert secret not in shown
    return message


@pytest.mark.s3
@pytest.mark.parametrize(
    "wrong",
    [
        {"AWS_SECRET_ACCESS_KEY": "hunter2hunter2"},
        {"AWS_ACCESS_KEY_ID": "AKIAHUNTER2HUNTER2"},
        {"AWS_SESSION_TOKEN": "hunter2/token"},
    ],
    ids=["secret", "key", "token"],
)
def test_wrong_credentials_are_called_that(wrong: dict[str, str], s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    for operation in operations(Store(s3)).values():
        message = failure(InputError, operation, *wrong.values())
        assert message.startswith(f"{s3}: ")
        assert "wrong or expired credentials" in message
        assert "AWS_SECRET_ACCESS_KEY" in message
    # The answer to HEAD has no body that could say which of the two it is.
    assert "not permitted (HTTP 403)" in failure(InputError, lambda: Store(s3).size("key"), *wrong.values())


@pytest.mark.s3
def test_a_missing_bucket_is_called_that(server: S3Server, s3: str) -> None:
    for name, operation in operations(Store("s3://no-such-bucket/run")).items():
        message = failure(InputError, operation)
        assert "(the bucket does not exist); create it" in message, name
        assert message.startswith("s3://no-such-bucket/run: "), name


@pytest.mark.s3
def test_a_read_only_place_can_be_read_and_not_written(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(s3).put("key", b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    store = Store(s3)
    store.check_readable()
    assert (store.get("key"), store.list()) == (b"x", ["key"])
    for name in ("check_writable", "put", "put large", "create", "open_writer", "delete"):
        message = failure(InputError, operations(store)[name], READER_KEY, READER_SECRET)
        assert "not permitted (AccessDenied" in message, name
    assert store.get("key") == b"x"


@pytest.mark.s3
def test_a_check_outlasts_a_few_refusals(proxy: FaultProxy, s3: str) -> None:
    refusals = iter([(503, "SlowDown")] * 6)
    proxy.intercept = lambda method, _: next(refusals, None) if method == "PUT" else None
    Store(s3).check_writable()
    assert proxy.refused == 6


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["black_hole", "refuse", "down", "nobody"])
def test_an_endpoint_that_does_not_answer_is_called_that(
    fault: str, proxy: FaultProxy, s3: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "down":
        proxy.slow_down = 1.0
    elif fault == "nobody":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    else:
        setattr(proxy, fault, True)
    store = Store(s3)
    expected = {
        "black_hole": "does not answer (timed out)",
        "refuse": "cannot be reached or cut the connection",
        "down": "the server answers SlowDown",
        "nobody": "connection refused",
    }[fault]
    for name in ("check_writable", "get", "create", *(["put large"] if fault == "nobody" else [])):
        assert expected in failure(StoreError, operations(store)[name]), name


@pytest.mark.s3
def test_what_a_server_says_is_shortened(proxy: FaultProxy, s3: str) -> None:
    def intercept(method: str, target: str) -> tuple[int, str]:
        return 400, "Code" * 200

    proxy.intercept = intercept
    message = failure(StoreError, lambda: Store(s3).put("key" * 60, b"x"))
    assert message.startswith(s3)
    assert "cannot be written" in message or "…" in message


class Careless(BaseHTTPRequestHandler):
    """An S3 server that overwrites whatever it is asked not to."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        if self.command == "GET":
            body = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
        elif self.command == "POST":
            body = b"<DeleteResult><Deleted><Key>x</Key></Deleted></DeleteResult>"
        self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


@contextmanager
def careless_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Careless) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_ignores_conditions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with careless_server() as endpoint:
        use(monkeypatch, environment(endpoint))
        store = Store("s3://bucket/run")
        store.check_readable()
        assert "ignores conditional writes" in failure(StoreError, store.check_writable)
        del store  # and the connections it keeps open


def test_directories_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(StoreError, match="is not one; choose another place"):
            storage.check_directory(path)
        with pytest.raises(StoreError, match="cannot be opened or created"):
            Store(path)
    with pytest.raises(StoreError, match="/proc/self cannot be written"):
        storage.check_directory(Path("/proc/self/nothing/deeper"))
    storage.check_directory(tmp_path / "not" / "yet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(StoreError, match="no such directory"):
        Store(tmp_path / "not there", False)


# Faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_a_busy_server_loses_nothing(proxy: FaultProxy, s3: str) -> None:
    proxy.slow_down = 0.4
    store = Store(s3)
    store.put("large", LARGE)
    for number in range(4):
        assert store.create(f"k/{number}", b"%d" % number)
    assert [store.get(key) for key in store.list("k")] == [b"%d" % number for number in range(4)]
    assert store.get("large") == LARGE
    store.delete(store.list())
    assert store.list() == []
    assert proxy.refused > 5


@pytest.mark.s3
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_cut_connection_loses_nothing(way: str, proxy: FaultProxy, s3: str) -> None:
    store = Store(s3)
    if way == "up":
        proxy.cut(up=1_000_000)
    store.put("large", LARGE)
    if way == "down":
        proxy.cut(down=10_000_000)
    assert store.get("large") == LARGE
    assert proxy.cuts == 1


@pytest.mark.s3
def test_a_creator_whose_answer_was_lost_is_still_the_winner(proxy: FaultProxy, s3: str) -> None:
    store = Store(s3)
    proxy.lose = 1
    assert store.create("record", b"mine") is True
    proxy.lose = 1
    assert store.create("record", b"other") is False
    assert store.get("record") == b"mine"


@pytest.mark.s3
def test_puts_deletes_and_streams_survive_lost_answers(proxy: FaultProxy, s3: str) -> None:
    store = Store(s3)
    proxy.lose = 2
    store.put("a", b"x")
    # The completion of a multipart upload cannot be repeated: the whole upload is.
    seen: list[str] = []

    def intercept(method: str, target: str) -> None:
        if method == "POST" and "uploadId" in target:
            seen.append(target)
            proxy.lose = int(len(seen) == 1)

    proxy.intercept = intercept
    store.put("large", LARGE)
    proxy.intercept = None
    assert seen
    assert (store.get("large"), store.list()) == (LARGE, ["a", "large"])
    proxy.lose = 1
    store.delete(["a"])
    assert store.list() == ["large"]


@pytest.mark.s3
def test_five_seconds_without_connections_lose_nothing(proxy: FaultProxy, s3: str) -> None:
    store = Store(s3)
    store.put("before", b"x")
    proxy.refuse = True
    timer = threading.Timer(5, lambda: setattr(proxy, "refuse", False))
    timer.start()
    with ThreadPoolExecutor(4) as pool:
        large = pool.submit(store.put, "large", LARGE)
        created = pool.submit(store.create, "record", b"x")
        got = pool.submit(store.get, "before")
        size = pool.submit(store.size, "absent")
        assert (large.result(), created.result(), got.result(), size.result()) == (None, True, b"x", None)
    timer.join()
    assert store.get("large") == LARGE


@pytest.mark.s3
def test_a_server_killed_while_it_is_written_to_loses_nothing(server: S3Server, proxy: FaultProxy, s3: str) -> None:
    store = Store(s3)
    store.put("before", LARGE)
    killed = threading.Event()

    def outage(method: str, target: str) -> None:
        """Kills the server when the second part of the upload comes."""
        if "partNumber=2" in target and not killed.is_set():
            killed.set()
            server.kill()

    proxy.intercept = outage
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(store.put, "during", LARGE)
        assert killed.wait(60)
        threading.Event().wait(5)
        server.restart()
        put.result()
    assert store.get("before") == store.get("during") == LARGE


@pytest.mark.s3
@pytest.mark.parametrize("size", [PART_BYTES + 1, len(LARGE)])
def test_a_failed_upload_names_its_cause_and_not_that_of_the_clean_up(
    size: int, proxy: FaultProxy, s3: str, impatient: None
) -> None:
    """The server may be written to no more; that parts cannot be dropped either is another matter."""

    def intercept(method: str, target: str) -> tuple[int, str] | None:
        if method == "DELETE":
            return 400, "NoDropping"
        return (403, "AccessDenied") if method == "PUT" else None

    proxy.intercept = intercept
    store = Store(s3)
    with pytest.raises(InputError, match="not permitted"), store.open_writer("key") as writer:
        writer.write(LARGE[:size])
    with pytest.raises(InputError, match="not permitted"):
        store.put("key", LARGE[:size])


# Publishing -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), "llama", layers=2)


def write(model: Model, store: Store, choice: Choice, shard: int = 5_000_000_000) -> WrittenRepository:
    return write_repository(
        model.source, model.layout, choice, model.candidates, store, max_shard_bytes=shard, manifest={}
    )


def verify(model: Model, store: Store, choice: Choice) -> tuple[str, ...]:
    return verify_repository(store, model.source, model.layout, choice, model.candidates).problems


def contents(store: Store) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list()}


def test_a_repository_is_seen_when_it_was_verified_and_not_before(model: Model, place: str) -> None:
    choice = mixed(model.layout)
    with staged_output(place) as store:
        repository = write(model, store, choice, shard=20_000)
        assert verify(model, store, choice) == ()
        assert {key: store.size(key) for key in store.list()} == repository.files
        assert bytes(store.get_ranges(CONFIG, [(0, 1)])[0]) == b"{"
        assert not {CONFIG, INDEX} & set(Store(place).list())
        with pytest.raises(InputError):
            Checkpoint(Store(place))
    assert verify(model, Store(place), choice) == ()
    assert {key: len(data) for key, data in contents(Store(place)).items()} == repository.files
    Checkpoint(Store(place))


@pytest.mark.s3
def test_both_kinds_of_place_hold_the_same_bytes(model: Model, s3: str, tmp_path: Path) -> None:
    for place in (s3, str(tmp_path / "out")):
        with staged_output(place) as store:
            write(model, store, mixed(model.layout), shard=20_000)
    assert contents(Store(s3)) == contents(Store(tmp_path / "out"))


@pytest.mark.s3
def test_config_is_written_last(model: Model, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    put = Store.put

    def noted(store: Store, key: str, data: bytes) -> None:
        order.append(key)
        put(store, key, data)

    monkeypatch.setattr(Store, "put", noted)
    with staged_output(s3) as store:
        write(model, store, uniform(model.layout, FormatName.FP8))
        order.clear()
    assert order == [MANIFEST, INDEX, CONFIG]


def test_a_block_that_raises_publishes_nothing_and_can_be_repeated(model: Model, place: str) -> None:
    choice = uniform(model.layout, FormatName.FP8)
    with pytest.raises(ValueError, match="wrong"), staged_output(place) as store:
        write(model, store, choice)
        raise ValueError("wrong")
    if not place.startswith("s3"):
        assert not Path(place).exists()
    else:
        assert not {CONFIG, INDEX} & set(Store(place).list())
        assert b'"complete": false' in Store(place).get(MANIFEST)
    check_output(place)
    with staged_output(place) as store:
        write(model, store, choice)
    assert verify(model, Store(place), choice) == ()


def test_a_repository_is_replaced_and_leaves_nothing(model: Model, place: str) -> None:
    with staged_output(place) as store:
        write(model, store, uniform(model.layout, FormatName.BF16), shard=20_000)
    # As if the model before had a file that this one has not; it would change how the tokenizer reads.
    old = Store(place)
    manifest = old.get(MANIFEST).replace(b'"config.json":', b'"added_tokens.json": 2,\n"config.json":', 1)
    old.put(MANIFEST, manifest)
    old.put("added_tokens.json", b"{}")
    choice = uniform(model.layout, FormatName.NVFP4)
    # A first attempt that stops early must not forget what has to go.
    for stop in (True, False):
        with suppress(ValueError), staged_output(place) as store:
            repository = write(model, store, choice)
            if stop:
                raise ValueError("stop")
    assert set(Store(place).list()) == repository.files.keys()
    assert verify(model, Store(place), choice) == ()


@pytest.mark.s3
def test_readers_of_a_prefix_never_see_a_mixture(model: Model, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every single write either a whole repository is there or none."""
    choices = [uniform(model.layout, name) for name in (FormatName.FP8, FormatName.MXFP8)]
    seen = []

    def look() -> None:
        keys = set(Store(s3).list())
        if CONFIG in keys:
            assert keys >= {INDEX, MANIFEST}
            assert () in [verify(model, Store(s3), choice) for choice in choices]
        seen.append(CONFIG in keys)

    def watched(write: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*arguments: Any) -> Any:
            look()
            return write(*arguments)

        return watching

    monkeypatch.setattr(Store, "put", watched(Store.put))
    monkeypatch.setattr(Store, "upload", watched(Store.upload))
    for choice in choices:
        with staged_output(s3) as store:
            write(model, store, choice)
    assert not any(seen)
    look()
    assert seen[-1]


def test_a_place_that_holds_something_else_is_refused(place: str) -> None:
    Store(place).put("thesis.txt", b"x")
    for attempt in (lambda: check_output(place), lambda: staged_output(place).__enter__()):
        with pytest.raises(InputError, match=r"holds something else \(thesis.txt\); choose another output or empty it"):
            attempt()
    assert Store(place).list() == ["thesis.txt"]


@pytest.mark.s3
def test_held_back_files_are_read_from_here(s3: str) -> None:
    held = StagedPrefix(Store(s3))
    held.put(MANIFEST, b'{"complete": false}')
    assert Store(s3).list() == [MANIFEST]
    held.put(MANIFEST, b'{"complete": true}')
    held.put(CONFIG, b"{}")
    assert Store(s3).get(MANIFEST) == b'{"complete": false}'
    assert (held.get(MANIFEST), held.size(CONFIG), held.list()) == (b'{"complete": true}', 2, [CONFIG, MANIFEST])
    held.delete([CONFIG])
    assert held.list() == [MANIFEST]
    held.put(INDEX, b"{}")
    held.publish()
    assert contents(Store(s3)) == {MANIFEST: b'{"complete": true}', INDEX: b"{}"}
