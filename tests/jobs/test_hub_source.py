"""A whole run from a model on the hub: the repository of a local copy, and no worker reads more than its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import snapshot_download

from actors import worker as workers
from actors.protocol import CallKind
from jobs.pipeline.inspection import inspect
from jobs.pipeline.run import Run
from prismaquant_ray.events import Event, Notice
from prismaquant_ray.repository.manifest import MANIFEST, README
from prismaquant_ray.source.hub import HubFiles
from prismaquant_ray.source.resolve import resolve
from prismaquant_ray.storage.prefix import Files
from tests.hub_cdn import Cdn
from tests.hub_server import HubServer, reach
from tests.inprocess import InProcessWorkers, in_process
from tests.runs import assembled, configuration, digests
from tests.tiny import make_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME = "somebody/tiny"


@pytest.fixture
def cdn() -> Iterator[Cdn]:
    with Cdn() as running:
        yield running


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, qwen3: Path, cdn: Cdn) -> Iterator[HubServer]:
    with HubServer() as server:
        reach(server, monkeypatch, tmp_path)
        server.make(NAME, {path.name: path.read_bytes() for path in qwen3.iterdir()}, private=False)
        server.cdn = cdn
        yield server


class Recorded:
    """Opens models as workers do, and remembers by worker which bytes of weights each asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[tuple[str, int]]] = []
        self.revisions: list[str] = []
        monkeypatch.setattr(workers, "resolve", self.resolve)

    def resolve(self, source: str, revision: str) -> Files:
        self.revisions.append(revision)
        found = resolve(source, revision)
        assert isinstance(found, HubFiles)
        read = found.get_ranges
        self.asked.append(asked := [])

        def get_ranges(key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
            asked.extend((key, start) for start, _ in ranges)
            return read(key, ranges)

        found.get_ranges = get_ranges  # type: ignore[method-assign]
        return found


def notices(said: list[str]) -> Callable[[Event], None]:
    return lambda event: said.append(event.message) if isinstance(event, Notice) else None


def test_a_run_from_the_hub_writes_what_one_from_a_copy_does_and_keeps_no_copy(
    tmp_path: Path,
    hub: HubServer,
    cdn: Cdn,
    qwen3: Path,
    qwen3_digests: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded, opened = Recorded(monkeypatch), list[InProcessWorkers]()
    config = configuration(tmp_path, Path(NAME))
    run = Run(config, open_workers=in_process(2, opened=opened))
    # All workers read the commit that the driver has opened, whatever the branch is by then.
    commit = hub.repositories[NAME].commits[-1].id
    other = make_checkpoint(tmp_path / "other", "qwen3", layers=4, seed=5)
    hub.replace(NAME, {path.name: path.read_bytes() for path in other.iterdir()})
    assembled(run)
    found = digests(config.store.output)
    # The model card names the model, a name on the hub or a directory, and the manifest has the card's digest.
    assert {name for name in found if found[name] != qwen3_digests[name]} == {README, MANIFEST}
    assert found.keys() == qwen3_digests.keys()
    assert recorded.revisions == [commit, commit]
    assert not [*tmp_path.glob("cache/**/*.safetensors")]

    copy = Run(configuration(tmp_path / "again", qwen3))
    assert run.source.fingerprint() == copy.source.fingerprint()
    (pool,) = opened
    _check_shards(run, recorded, pool)


def _check_shards(run: Run, recorded: Recorded, pool: InProcessWorkers) -> None:
    """Each worker has read every block of its shards once a visit, and no other block, but for the one it tried."""
    blocks, tensors = run.layout.blocks, run.source.tensors
    names = {(tensors[name].file, tensors[name].start): name for name in tensors}
    of_block = {name: block.index for block in blocks for name in block.tensors}
    setups = [worker for worker, call in pool.log if call.kind is CallKind.SETUP]
    assert len(setups) == len(recorded.asked) == 2
    for worker, asked in zip(setups, recorded.asked, strict=True):
        calls = [call for name, call in pool.log if name == worker]
        tried = [0] if any(call.kind is CallKind.PREFLIGHT for call in calls) else []
        shards = dict.fromkeys(call.shard for call in calls if call.shard is not None)
        mine = Counter([*tried, *(unit for shard in shards for unit in shard.units if isinstance(unit, int))])
        read = Counter(of_block.get(names.get(key, "")) for key in asked)
        del read[None]
        assert read == Counter({block: visits * len(blocks[block].tensors) for block, visits in mine.items()})


def test_without_ranges_the_driver_says_so_before_anything_and_workers_read_the_snapshot(
    tmp_path: Path, hub: HubServer, cdn: Cdn, qwen3: Path, qwen3_digests: dict[str, str]
) -> None:
    cdn.answers_ranges = False
    said: list[str] = []
    names = [path.name for path in qwen3.glob("*.safetensors")]
    config = configuration(tmp_path, Path(NAME))
    run = Run(config, on_event=notices(said), open_workers=in_process(1))
    assert run.source.store.path is not None
    assert len(said) == 1
    assert said[0].startswith(f"{NAME}: the server of its weights does not answer byte ranges")
    assembled(run)
    found = digests(config.store.output)
    assert {name for name in found if found[name] != qwen3_digests[name]} == {README, MANIFEST}
    assert Counter(cdn.whole) == Counter({**dict.fromkeys(names, 1), min(names): 2})  # the first was asked for a part
    # Read by ranges, from a cache without weights, it is the same model to the last byte.
    cdn.answers_ranges = True
    identity = run.source.fingerprint()
    for path in tmp_path.glob("cache/**/blobs/*"):
        path.unlink()
    again = configuration(tmp_path / "again", Path(NAME))
    other = Run(again, open_workers=in_process(1))
    assert other.source.store.path is None
    assert other.source.fingerprint() == identity
    assembled(other)
    assert digests(again.store.output) == found


def test_inspecting_reads_headers_only(tmp_path: Path, hub: HubServer, cdn: Cdn, qwen3: Path) -> None:
    inspect(configuration(tmp_path, Path(NAME)))
    sizes = {path.name: path.stat().st_size for path in qwen3.glob("*.safetensors")}
    headers = {name: 8 + int.from_bytes((qwen3 / name).read_bytes()[:8], "little") for name in sizes}
    assert cdn.whole == []
    assert all(sent.stop <= headers[sent.file] for sent in cdn.sent)
    assert sum(sent.nbytes for sent in cdn.sent) == sum(headers.values()) + 8
    assert not [*tmp_path.glob("cache/**/*.safetensors")]


def test_a_run_continues_whether_the_model_came_by_ranges_or_is_in_the_cache_by_now(
    tmp_path: Path, hub: HubServer
) -> None:
    config = configuration(tmp_path, Path(NAME))
    before = Run(config, open_workers=in_process(1))
    assert before.store.uri
    assert before.source.store.path is None
    snapshot_download(NAME)
    after = Run(config, open_workers=in_process(1))
    assert after.source.store.path is not None
    assert after.store.uri == before.store.uri  # another model there would be refused
