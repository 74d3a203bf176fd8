"""Claims about the command line: exit codes, one line an error, JSON that is JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from actors.pool import WORKER_ENVIRONMENT
from jobs.command_line import COMMANDS, CONFIG, cli
from jobs.pipeline.run import Run
from prismaquant_ray.allocation.plans import Planner
from prismaquant_ray.errors import InputError, WorkerBugError
from prismaquant_ray.formats import FormatName
from tests.inprocess import in_process
from tests.light import light
from tests.runs import configuration, quantized
from tests.tiny import make_checkpoint
from tests.tiny_families import make_family


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a finished run."""
    directory = tmp_path_factory.mktemp("cli")
    config = configuration(directory, make_checkpoint(directory / "source", "llama"))
    quantized(config)
    return directory / "config.yaml"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


#: Commands that need a configuration and nothing else; `doctor` starts a Ray of its own.
CONFIGURED = [
    pytest.param(name, marks=pytest.mark.faults) if name == "doctor" else name
    for name, command in sorted(COMMANDS.items())
    if CONFIG in command.parameters and name not in ("explain", "export-recipe")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGURED, "formats"])
def test_every_command_prints_json_and_a_summary(finished: Path, name: str) -> None:
    as_json = call(name, finished, "--json")
    assert as_json.exit_code == 0, as_json.output
    assert isinstance(json.loads(as_json.stdout), dict)
    readable = call(name, finished)
    assert readable.exit_code == 0
    assert readable.stdout.strip()
    assert "Traceback" not in readable.output


def test_a_recipe_is_exported_for_each_tool_or_for_none(finished: Path, tmp_path: Path) -> None:
    exported = call("export-recipe", finished, tmp_path / "both", "--json")
    assert exported.exit_code == 0, exported.output
    body = json.loads(exported.stdout)
    assert body["files"] == [str(tmp_path / "both" / name) for name in ("recipe.yaml", "modelopt.yaml")]
    # Seven Linears in each of two layers, and the head.
    assert sum(body["linears"].values()) == 15
    assert body["linears"]["NVFP4"] > 0
    assert all(Path(path).read_text().startswith("# The plan 6bpp of") for path in body["files"])
    one = call("export-recipe", finished, tmp_path / "one", "--for", "modelopt")
    assert (one.exit_code, [path.name for path in (tmp_path / "one").iterdir()]) == (0, ["modelopt.yaml"])
    assert "do not travel" in one.stdout
    (tmp_path / "file").touch()
    refused = call("export-recipe", finished, tmp_path / "file")
    assert (refused.exit_code, refused.stderr.count("\n")) == (3, 1)


def test_formats_needs_no_configuration() -> None:
    result = call("formats", "--json")
    assert {entry["format"] for entry in json.loads(result.stdout)["formats"]} == {
        "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A8", "MXFP8", "FP8", "FP8_BLOCK", "INT3A16", "INT4", "INT4A8", "INT6A16",
        "INT8", "INT8A16", "BF16",
    }  # fmt: skip
    readable = call("formats").stdout
    assert "INT8: CUTLASS up to SM90; from SM100 on vLLM chooses it, too, and ends at the first product." in readable
    assert "SM90 only" in readable


def test_formats_counts_the_fused_groups_that_can_take_each(finished: Path, tmp_path: Path) -> None:
    def counts(config: Path) -> dict[str, tuple[int, int]]:
        found = json.loads(call("formats", config, "--json").stdout)["formats"]
        return {entry["format"]: (entry["groups"], entry["of"]) for entry in found}

    # Two layers with q/k/v, o, gate/up and down each; two with q/k/v, o and experts each.
    blocks = dict.fromkeys(["FP8_BLOCK", "INT4A8", "MXFP4A8"], (0, 8))
    assert counts(finished) == dict.fromkeys(FormatName, (8, 8)) | blocks
    configuration(tmp_path, make_family(tmp_path / "source", "qwen3_moe", moe_intermediate_size=80))
    others = {"FP8": (6, 6), "INT8": (6, 6), "BF16": (6, 6), "NVFP4": (6, 6)}
    experts_cannot = dict.fromkeys(["NVFP4A16", "MXFP4", "MXFP8", "INT3A16", "INT4", "INT6A16", "INT8A16"], (4, 6))
    blocks = dict.fromkeys(["FP8_BLOCK", "INT4A8", "MXFP4A8"], (4, 6))
    assert counts(tmp_path / "config.yaml") == others | experts_cannot | blocks
    assert "4 of 6" in call("formats", tmp_path / "config.yaml").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "budget.bpp=3"), "error: budget 3 bits per parameter is below the smallest plan"),
        (("--set", "formats=[NVFP9]"), "unknown format 'NVFP9'; did you mean NVFP4?"),
        (("--set", "formats=[FP8_BLOK]"), "unknown format 'FP8_BLOK'; did you mean FP8_BLOCK?"),
        (("--set", "model.source=/nowhere"), "neither a directory nor in the hub's cache"),
        (("--set", "calibration.text=/nowhere.txt"), "/nowhere.txt"),
        (("--set", "calibration.text=/nowhere.json"), "/nowhere.json: .json is not read; write one object a line"),
        (("--set", "calibration.text=mix:chats"), "unknown kind 'mix:chats'; did you mean mix:chat?"),
        (("--set", "calibration.text=[a.txt, a.txt]"), "a.txt is named twice"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(finished: Path, arguments: tuple[str, ...], message: str) -> None:
    result = call("quantize", finished, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_broken_repository_is_reported_by_verify(finished: Path, tmp_path: Path) -> None:
    other = ("--set", f"store.output={tmp_path / 'other'}")
    assert call("verify", finished, *other).exit_code == 2
    assert call("assemble", finished, *other).exit_code == 0
    assert call("verify", finished, *other).exit_code == 0
    (shard,) = (tmp_path / "other").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0xFF
    shard.write_bytes(data)
    result = call("verify", finished, *other)
    assert result.exit_code == 2
    assert "problems" in result.stdout or "problem" in result.stdout


def test_a_bug_is_one_line_and_exit_code_1(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Planner, "plan_for", broken)
    result = call("allocate", finished)
    assert result.exit_code == 1
    assert result.stderr == "bug: ZeroDivisionError: oh (run again with --debug for the traceback)\n"
    assert isinstance(call("allocate", finished, "--debug").exception, ZeroDivisionError)

    def broken_there(*_: object) -> None:
        raise WorkerBugError("KeyError", "'x'", "forward run 0003, microbatch 2 on worker-1")

    monkeypatch.setattr(Planner, "plan_for", broken_there)
    expected = (
        "bug: KeyError: 'x' (forward run 0003, microbatch 2 on worker-1) (run again with --debug for the traceback)\n"
    )
    assert call("allocate", finished).stderr == expected


def test_ctrl_c_says_that_the_run_continues(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Planner, "plan_for", stopped)
    result = call("allocate", finished)
    assert (result.exit_code, result.stderr) == (130, "stopped; the same command continues\n")


def test_help_needs_no_torch() -> None:
    overall, *each = light(("--help",), *((name, "--help") for name in COMMANDS))
    assert all(name in overall for name in COMMANDS)
    for (name, command), text in zip(COMMANDS.items(), each, strict=True):
        assert f"prismaquant-ray {name}" in text or f"cli {name}" in text
        assert command.help.split()[0] in text


def test_status_needs_no_torch(finished: Path) -> None:
    (status,) = light(("status", finished.parent / "run", "--json"))
    assert json.loads(status)["state"] == "measured"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["allocate", "assemble", "verify"])
def test_what_runs_no_model_imports_no_ray_and_leaves_garbage_collection_on(finished: Path, name: str) -> None:
    code = f"import gc, sys; sys.argv=['x', '{name}', '{finished}']\n"
    code += "try:\n import jobs.__main__ as m; m.main()\nexcept SystemExit as end: assert not end.code\n"
    code += "assert 'ray' not in sys.modules and gc.isenabled()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.memory
@pytest.mark.faults
def test_a_workers_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    """Peak RSS of 4 and of 44 equal blocks, and the promise of the plan."""
    script = tmp_path / "peak.py"
    script.write_text(
        "import re, sys\n"
        "from pathlib import Path\n"
        "from jobs.pipeline.run import Run\n"
        "from prismaquant_ray.config import load_config\n"
        "from tests.inprocess import in_process\n"
        "run = Run(load_config(Path(sys.argv[1]), ['formats=[MXFP8, BF16]', 'rounding.gptq=null', 'budget.bpp=9',"
        " 'cluster.blocks_per_shard=1']),"
        " open_workers=in_process())\n"
        "run.measure()\n"
        # Not ru_maxrss, which a child inherits from the process that forked it.
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]\n"
        "print(int(peak) * 1024, run.memory_plan.cpu.peak(1))\n"
    )
    peaks = {}
    shape = {"hidden": 512, "intermediate": 2048, "heads": 8, "kv_heads": 8, "head_dim": 64}
    for layers in (4, 44):
        directory = tmp_path / str(layers)
        configuration(directory, make_checkpoint(directory / "source", "llama", layers=layers, **shape))
        done = subprocess.run(
            [sys.executable, script, directory / "config.yaml"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ".", **WORKER_ENVIRONMENT},
        )  # fmt: skip
        peak, promised = (int(word) for word in done.stdout.split()[-2:])
        peaks[layers] = peak
        block = 2 * (4 * 512 * 512 + 3 * 512 * 2048)
        boundary = 8 * 32 * 512 * 4
        assert peak < 2 * block * (1 + 2) + boundary + 1_500_000_000
        assert peak < promised * 1.15
    # Forty more blocks are 336 MB in BF16 and 671 MB as computed: a block may leave 2.5 MB. Fewer blocks would do, but
    # for when memory is given back, which depends on what else runs on the machine: 63 MB on a busy one.
    assert peaks[44] - peaks[4] < 40 * 2_500_000


@pytest.mark.memory
@pytest.mark.slow
def test_a_workers_heap_keeps_no_logits_of_the_models_it_compares() -> None:
    """Figures of every model stay between logits that go: in a heap that kept large blocks they would pin them all."""
    script = (
        "import re, torch\n"
        "from pathlib import Path\n"
        "from prismaquant_ray.evaluation.divergence import SourceLogits\n"
        "def peak(models):\n"
        "    following, found = torch.zeros(340, dtype=torch.int64), []\n"
        "    for _ in range(2):\n"
        "        source = None\n"
        "        for _ in range(models):\n"
        "            logits = torch.zeros(340, 49152, dtype=torch.bfloat16).float()\n"
        "            source = source or SourceLogits(logits, following)\n"
        "            found.append(source.against(logits))\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "print(peak(2), peak(12))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ".", **WORKER_ENVIRONMENT},
    )  # fmt: skip
    few, many = map(int, done.stdout.split())
    assert many - few < 300_000_000


def test_a_worker_reports_a_failure_as_a_record(tmp_path: Path) -> None:
    from actors.messages import WorkerSpec
    from actors.worker import ShardWorker

    config = configuration(tmp_path, make_checkpoint(tmp_path / "source", "llama"))
    spec = WorkerSpec(name="w", config=config, source=str(tmp_path / "source"), revision="main", run=str(tmp_path))
    receipt = ShardWorker().setup(spec)
    assert receipt.failure is not None
    assert receipt.failure.kind == "ResourceError"
    assert "must be a directory that they share" in receipt.failure.message
    receipt = ShardWorker().setup(replace(spec, gpu=True))
    assert receipt.failure is not None
    assert receipt.failure.kind == "ResourceError"
    assert "which torch" in receipt.failure.message
    assert "install a torch that is built for CUDA" in receipt.failure.message
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        (tmp_path / "source" / "tokenizer.json").unlink()
        Run(config, open_workers=in_process()).check()
