"""Claims about broken and hostile files: one line and exit 2 or 3, or made again, or skipped; never a bug."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from jobs.command_line import cli
from jobs.pipeline.repository_evaluation import evaluate
from jobs.pipeline.run import Run
from prismaquant_ray.errors import InputError
from prismaquant_ray.events import ObjectRepaired, read_events
from prismaquant_ray.storage.store import Store
from tests.broken import LONGEST
from tests.inprocess import InProcessWorkers, in_process, unopened
from tests.repositories import rewrite
from tests.runs import assembled, configuration, digests, quantized
from tests.tiny import make_checkpoint, make_text

SEED, MUTATIONS = 17, 300
#: Bytes.
MOST_MEMORY = 1_000_000_000
#: Seconds of a processor: what else runs on the machine does not count.
MOST_TIME = 60.0


@pytest.mark.slow
def test_whatever_is_broken_every_command_ends_as_it_should(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Mutations of every small file and of every tensor file, each before a command that reads it, in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.broken", tmp_path / "broken", str(SEED), str(MUTATIONS)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=900,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.stderr[-2000:], told[-1:])
    *cases, total = told
    found = [case for case in cases if "exit" in case]
    assert len(found) == MUTATIONS == total["cases"]
    wrong = [(case["number"], case["case"], *problems) for case in found if (problems := wrongs(case))]
    assert wrong == []
    # Nothing of this would be noticed if everything ended alike.
    exits = {code: sum(case["exit"] == code for case in found) for code in (0, 2, 3)}
    assert min(exits.values()) > 10, exits
    in_workers = [case["exit"] for case in found if case["case"].endswith("evaluate") and "worker-0" in case["said"]]
    assert {0, 2} <= set(in_workers)
    assert total["seconds"] <= MOST_TIME
    record_property(
        "broken files",
        f"{MUTATIONS} mutations in {total['seconds']} s of a processor, at most "
        f"{max(case['peak_bytes'] for case in found) / 1e6:.0f} MB: {exits}",
    )


def wrongs(case: dict[str, Any]) -> list[str]:
    """What is wrong with the end of a command."""
    found = []
    errors = [line for line in case["lines"] if line.startswith(("error:", "bug:"))]
    if case["exit"] not in (0, 2, 3):
        found.append(f"exit {case['exit']}: {errors} {case.get('traceback', '')}")
    # `verify` ends with a list of problems.
    listed = case["case"].endswith("verify") and "problems;" in case["said"]
    if case["exit"] in (2, 3) and not listed and not (len(errors) == 1 and case["named"]):
        found.append(f"is not one line that names a file or a setting: {case['lines']}")
    if case["written"]:
        found.append(f"wrote outside: {case['written']}")
    if case["seconds"] > LONGEST:
        found.append(f"took {case['seconds']} s")
    if case["peak_bytes"] > MOST_MEMORY:
        found.append(f"took {case['peak_bytes']:,} bytes")
    return found


# Records of another run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama_untied")


SETTINGS = ("rounding.gptq=null", "rounding.scale_search.grid=2")


def test_records_of_another_run_or_unit_are_not_taken_for_this_ones(tmp_path: Path, source: Path) -> None:
    """Each has a digest that is right, names objects that are there, and fits the layout."""
    other = configuration(tmp_path / "other", source, *SETTINGS, "calibration.seed=5")
    quantized(other)
    config = configuration(tmp_path / "mine", source, *SETTINGS)
    quantized(config)
    expected = digests(config.store.output)
    ours, theirs = Path(config.store.run), Path(other.store.run)
    strangers = {
        "backward/0000": (theirs / "backward/0000", "backward/0000/record.json is of another run"),
        "forward/0001": (theirs / "forward/0001", "forward/0001/record.json is of another run"),
        "backward/0001": (ours / "backward/0000", "backward/0001/record.json is of another run"),
        "calibration": (theirs / "calibration", "calibration/record.json is of another run"),
    }
    for place, (stranger, message) in strangers.items():
        shutil.copytree(stranger, tmp_path / "kept")
        shutil.rmtree(ours / place)
        shutil.move(tmp_path / "kept", ours / place)
        shutil.rmtree(config.store.output)
        run = Run(config, open_workers=in_process())
        assembled(run)
        assert digests(config.store.output) == expected, place
        repairs = [event.message for event in read_events(run.store) if isinstance(event, ObjectRepaired)]
        assert message in repairs[-1]
    shutil.copyfile(theirs / "run.json", ours / "run.json")
    with pytest.raises(InputError, match=r"holds a run with another calibration\.seed"):
        Run(config, open_workers=unopened).measured()


def test_the_layout_of_another_model_is_not_taken_for_this_ones(tmp_path: Path, source: Path) -> None:
    larger = make_checkpoint(tmp_path / "larger", "llama_untied", intermediate=192)
    for name, model in (("other", larger), ("mine", source)):
        quantized(configuration(tmp_path / name, model, *SETTINGS))
    config = configuration(tmp_path / "mine", source, *SETTINGS)
    expected = Run(config, open_workers=unopened).layout
    path = tmp_path / "mine/run/layout.json"
    for body in ((tmp_path / "other/run/layout.json").read_bytes(), b"", b"[]", b"{}", path.read_bytes()[:-200]):
        path.write_bytes(body)
        assert Run(config, open_workers=unopened).layout == expected
        assert path.read_bytes() != body, "it is stored again"


# Small files of a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """A finished run; copy it before changing it."""
    directory = tmp_path_factory.mktemp("finished")
    quantized(configuration(directory, source, *SETTINGS))
    return directory


@pytest.fixture
def mine(finished: Path, source: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path / "mine")
    configuration(tmp_path / "mine", source, *SETTINGS)
    return tmp_path / "mine"


def words(mine: Path, name: str) -> list[str]:
    return [name, str(mine / "config.yaml"), *(f"--set={setting}" for setting in SETTINGS)]


@pytest.mark.parametrize("body", ["", "{", "[]", '{"peak_bytes": "many"}', '{"peak_bytes": 1e400}', "[" * 5000])
def test_the_mark_of_a_measured_run_is_made_again(mine: Path, body: str) -> None:
    path = mine / "run/measured.json"
    before = json.loads(path.read_text())
    path.write_text(body)
    (status,) = [CliRunner().invoke(cli, ["status", str(mine / "run"), "--json"])]
    assert json.loads(status.stdout)["state"] == "stopped; the same command continues"
    assert CliRunner().invoke(cli, words(mine, "allocate")).exit_code == 0
    assert json.loads(path.read_text()) == before


def test_a_cut_log_stops_nothing(mine: Path) -> None:
    path = mine / "run/events.jsonl"
    path.write_bytes(path.read_bytes()[:-25])
    for arguments in (["status", str(mine / "run")], words(mine, "assemble"), words(mine, "report")):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("body", ["", "{", "[]", '{"fingerprint": {}, "config": {}}', "[" * 5000])
def test_what_says_whose_run_it_is_cannot_be_made_again(mine: Path, body: str) -> None:
    (mine / "run/run.json").write_text(body)
    for arguments, code in ((["status", str(mine / "run")], 2), (words(mine, "report"), 3)):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == code or "holds a run with another" in result.stderr
        assert result.stderr.count("\n") == 1
        assert "run.json" in result.stderr or str(mine / "run") in result.stderr


def test_leases_that_are_none_are_passed_over(mine: Path) -> None:
    (mine / "run/lease").mkdir(exist_ok=True)
    (mine / "run/lease/notes.txt").write_text("x")
    (mine / "run/lease/00000003.json").write_text('{"id": [], "host": 3}')
    assert CliRunner().invoke(cli, ["status", str(mine / "run")]).exit_code == 0
    assert CliRunner().invoke(cli, words(mine, "assemble")).exit_code == 0


# Tensors -------------------------------------------------------------------------------------------------------------


def test_scales_that_are_no_numbers_are_named_by_who_reads_them(mine: Path, source: Path, tmp_path: Path) -> None:
    """By `verify`, by `dequantize`, and by `evaluate` where a worker loads them."""
    repository = mine / "repository"
    shards = [load_file(path) for path in repository.glob("*.safetensors")]
    name, scale = next((n, t) for shard in shards for n, t in shard.items() if n.endswith("proj.weight_scale"))
    # NaN in every type of a scale.
    scale.view(torch.uint8).fill_(0xFF)
    rewrite(repository, {name: scale})
    verified = CliRunner().invoke(cli, words(mine, "verify"))
    assert verified.exit_code == 2
    assert f"{name} has zero, negative, infinite or NaN scales" in verified.stdout.replace("\n", "")
    decoded = CliRunner().invoke(cli, ["dequantize", str(repository), str(tmp_path / "decoded")])
    assert decoded.exit_code == 2
    assert name.removesuffix(".weight_scale") in decoded.stderr
    assert not (tmp_path / "decoded").exists()
    text = make_text(tmp_path, 2000, seed=9)
    opened: list[InProcessWorkers] = []
    options: dict[str, Any] = {"sequences": 1, "length": 8, "open_workers": in_process(opened=opened)}
    with pytest.raises(InputError, match=name.removesuffix(".weight_scale")):
        evaluate(str(repository), str(source), text, **options)
    assert opened[0].log, "a worker had it"


def test_weights_that_are_too_large_for_a_probability_are_named(mine: Path, source: Path, tmp_path: Path) -> None:
    repository = mine / "repository"
    (path,) = repository.glob("*.safetensors")
    tensors = load_file(path)
    tensors["lm_head.weight"].fill_(3e38)
    save_file(tensors, path)
    text = make_text(tmp_path, 2000, seed=9)
    options: dict[str, Any] = {"sequences": 1, "length": 8, "open_workers": in_process()}
    with pytest.raises(InputError, match=f"{repository}: what it predicts is NaN or infinite"):
        evaluate(str(repository), str(source), text, **options)


def test_what_is_no_file_is_not_waited_for(mine: Path, tmp_path: Path) -> None:
    """A pipe in place of anything that is read, by us or by a library."""
    for place in ("repository/config.json", "run/run.json", "run/layout.json", "run/backward/0000/record.json"):
        path = mine / place
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        result = CliRunner().invoke(cli, words(mine, "verify"))
        assert result.exit_code == 3, place
        assert f"{path.name} is not a file, but a pipe, a socket or a device" in result.stderr.replace("\n", " ")
        path.unlink()
        path.write_bytes(kept)
    with pytest.raises(KeyError):
        Store(mine).get("run")


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("formats=[[a]]", "formats: unknown format ['a']"),
        ("budget.bpp=inf", "budget.bpp: Input should be a finite number"),
        ("budget.bpp=1e400", "budget.bpp: Input should be a finite number"),
        ("budget.bytes=9e999GB", "budget.bytes: "),
        (f"calibration.sequences={'9' * 30}", "calibration: sequences has more than 64 bits"),
        ("store.run=", "store.run: None is no place; give a directory or a URI of s3://, gs://"),
        ("store.run=[]", "store.run: [] is no place"),
        ("calibration.text=/dev/zero", "/dev/zero cannot be read: it is not a file"),
        ("calibration.images=/dev/zero", "/dev/zero cannot be read: it is not a file"),
        (f"store.output={'x' * 300}", "store: output is no name: a part of it has more than 255 bytes"),
        (f"model.source={'a/' * 3000}", "model: source is no name: it has a NUL, or more than 4000 characters"),
        ('calibration.text="a\\0b"', "calibration.text.0: path is no name"),
        ("formats=" + "[" * 2000, "is nested deeper than 64 levels"),
        ("cluster.labels=&a [*a]", "is nested deeper than 64 levels"),
        ("model.source=!!python/name:os.system", "is not YAML"),
    ],
)
def test_a_hostile_setting_is_one_line(mine: Path, setting: str, message: str) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(mine / "config.yaml"), "--set", setting])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "function-before" not in result.stderr
