"""Bad places and hostile surroundings, through the command line: one line, exit code 2 or 3, nothing half written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs.command_line import cli
from jobs.pipeline.run import Run
from prismaquant_ray.config import load_config
from prismaquant_ray.storage.store import Store
from tests.inprocess import in_process
from tests.runs import assembled, configuration, digests, quantized
from tests.s3_server import ACCESS_KEY, READER_KEY, READER_SECRET, SECRET_KEY, S3Server, environment
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(s3_server: S3Server) -> S3Server:
    s3_server.make_bucket("places")
    return s3_server


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama", layers=3)


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for key, value in environment(server.endpoint).items():
        monkeypatch.setenv(key, value)
    return "s3://places"


def configured(directory: Path, source: Path, *overrides: str) -> tuple[str, ...]:
    configuration(directory, source)
    return str(directory / "config.yaml"), *(word for override in overrides for word in ("--set", override))


def refused(result: Result, code: int, *messages: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    for message in messages:
        assert message in result.stderr
    for secret in (SECRET_KEY, READER_SECRET, ACCESS_KEY, READER_KEY):
        assert secret not in result.output


@pytest.mark.s3
@pytest.mark.parametrize("place", ["store.run", "store.output", "model.source"])
def test_wrong_credentials_and_missing_buckets_are_one_line(
    tmp_path: Path, source: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    arguments = configured(tmp_path, source, f"{place}=s3://nowhere-to-be-found/x")
    refused(CliRunner().invoke(cli, ["quantize", *arguments]), 2, "s3://nowhere-to-be-found/x", "bucket")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    arguments = configured(tmp_path, source, f"{place}={bucket}/x")
    refused(CliRunner().invoke(cli, ["quantize", *arguments]), 2, f"{bucket}/x", "credentials")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "repository").exists()


@pytest.mark.s3
def test_a_read_only_output_is_refused_before_anything_is_measured(
    tmp_path: Path, source: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    arguments = configured(tmp_path, source, f"store.output={bucket}/out")
    refused(CliRunner().invoke(cli, ["quantize", *arguments]), 2, f"{bucket}/out")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_is_one_line(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(key, value)
    arguments = configured(tmp_path, source, "store.run=s3://places/run")
    refused(CliRunner().invoke(cli, ["quantize", *arguments]), 3, "s3://places/run")
    refused(CliRunner().invoke(cli, ["status", "s3://places/run"]), 3, "s3://places/run")


@pytest.mark.s3
def test_object_storage_holds_the_same_repository_and_no_credentials(tmp_path: Path, source: Path, bucket: str) -> None:
    local = configuration(tmp_path / "local", source)
    quantized(local)
    model = Store(f"{bucket}/model")
    for path in source.iterdir():
        model.put(path.name, path.read_bytes())
    configuration(tmp_path / "remote", source)
    places = ["model.source=s3://places/model", "store.run=s3://places/run", "store.output=s3://places/out"]
    config = load_config(tmp_path / "remote" / "config.yaml", places)
    from jobs.commands import verify

    run = Run(config, open_workers=in_process(2))
    run.check()
    run.measure()
    assembled(run)
    assert verify.run(config).ok
    output = Store(f"{bucket}/out")
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for key in output.list():
        (downloaded / key).write_bytes(output.get(key))
    # The card names the source as each was asked for, and the manifest has the card's size.
    stored, written = digests(downloaded), digests(local.store.output)
    assert {key for key in written if stored.get(key) != written[key]} <= {"README.md", "prismaquant.json"}
    assert {path.name for path in downloaded.iterdir()} == {path.name for path in local.store.output.iterdir()}
    for place in ("run", "out"):
        store = Store(f"{bucket}/{place}")
        for key in store.list():
            data = store.get(key)
            assert SECRET_KEY.encode() not in data, key
            assert ACCESS_KEY.encode() not in data, key
    shown = CliRunner().invoke(cli, ["status", "s3://places/run"])
    assert shown.exit_code == 0
    assert "3 of 3 encoded, 3 of 3 priced" in shown.output


def test_credentials_in_a_uri_are_refused_without_repeating_them(tmp_path: Path, source: Path) -> None:
    arguments = configured(tmp_path, source, "store.run=s3://me:hunter2@places/run")
    result = CliRunner().invoke(cli, ["quantize", *arguments])
    refused(result, 2, "store.run" if "store.run" in result.stderr else "s3://")
    assert "hunter2" not in result.output


def test_nothing_in_the_code_reads_pickles() -> None:
    for package in ("prismaquant_ray", "actors", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & {n.split(".")[0] for n in names}, (
                    path
                )
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    assert (node.value.id, node.attr) != ("torch", "load"), path
