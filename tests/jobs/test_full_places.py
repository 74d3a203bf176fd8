"""Claims about places without space while a repository is assembled: one line, exit 3, and the same bytes afterwards.

File systems of a few MB are mounted for them, which takes root.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs.command_line import cli
from jobs.pipeline.assembly import assemble
from jobs.pipeline.run import Run
from prismaquant_ray.config import load_config
from prismaquant_ray.errors import StoreError
from prismaquant_ray.events import Event, Notice
from tests.inprocess import in_process, unopened
from tests.runs import assembled, configuration, digests, measured
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A measured run in `store/run`, to be written to `out/repository`, each on a small file system of its own."""
    directory = tmp_path_factory.mktemp("places")
    source = make_checkpoint(directory / "source", "llama")
    with ExitStack() as mounted:
        for name in ("store", "out"):
            (directory / name).mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", directory / name], check=True)
            mounted.callback(subprocess.run, ["umount", "--lazy", directory / name], check=True)
        configuration(directory, source)
        body = json.loads((directory / "config.yaml").read_text())
        body["store"] = {"run": f"{directory}/store/run", "output": f"{directory}/out/repository"}
        (directory / "config.yaml").write_text(json.dumps(body))
        yield directory


@pytest.fixture(scope="module")
def expected(places: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    elsewhere = configuration(tmp_path_factory.mktemp("elsewhere"), places / "source")
    return repository_digests(Path(assembled(measured(elsewhere)).repository))


def repository_digests(path: Path) -> dict[str, str]:
    """Of all but the card, which names places."""
    return {name: digest for name, digest in digests(path).items() if name not in ("README.md", "prismaquant.json")}


def fill(directory: Path) -> Path:
    """Leave no byte free."""
    path = directory / "filler"
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return path


def run(places: Path) -> Result:
    return CliRunner().invoke(cli, ["assemble", str(places / "config.yaml")])


@pytest.mark.parametrize("place", ["store", "out"])
def test_a_full_place_is_one_line_and_the_command_works_once_there_is_space(
    places: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    assert Run.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Run.__init__.__kwdefaults__, "open_workers", in_process())
    assert run(places).exit_code == 0
    before = repository_digests(places / "out/repository")
    filler = fill(places / place)
    full = run(places)
    assert full.exit_code == 3, full.output
    (error,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left" in error
    assert str(places / place) in error
    # What was there stays, and nothing half written beside it.
    assert repository_digests(places / "out/repository") == before
    assert sorted(path.name for path in (places / "out").iterdir() if path != filler) == ["repository"]
    assert list((places / "store/run/lease").glob("*")) == []
    filler.unlink()
    monkeypatch.setitem(Run.__init__.__kwdefaults__, "open_workers", unopened)
    assert run(places).exit_code == 0
    assert repository_digests(places / "out/repository") == expected


def test_a_run_store_that_fills_up_while_the_repository_is_verified_loses_nothing(
    places: Path, expected: dict[str, str]
) -> None:
    fillers: list[Path] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Notice) and event.message.startswith("verifying"):
            fillers.append(fill(places / "store"))

    config = load_config(places / "config.yaml")
    working = Run(config, on_event=on_event, open_workers=in_process())
    found = working.measured()
    with pytest.raises(StoreError, match="No space left"):
        assemble(working, found, found.plan)
    fillers[0].unlink()
    assert repository_digests(places / "out/repository") == expected
    assert run(places).exit_code == 0
    assert repository_digests(places / "out/repository") == expected
