"""Broken and hostile files in front of every command that reads them: a process of its own that tells what happened.

`python -m tests.broken FOLDER SEED COUNT`: COUNT mutations of the files of a finished run of a tiny model, one command
after each, in this process and with workers in it. It prints a JSON line before a command and one behind it, so that
one that never ends is known by name, too. `tests/jobs/test_broken_files.py` judges.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.mutations import EVENTS, JSON, OVERRIDES, TENSORS, YAML, Mutation
from tests.ports import free_ports

#: Seconds of a processor that a command may take.
LONGEST = 20.0
#: Commands by what is broken: files that match a pattern, below the work folder, and how often that is chosen.
CASES: tuple[tuple[int, str, tuple[Mutation, ...], tuple[str, ...]], ...] = (
    (2, "run/run.json", JSON, ("status", "report", "allocate", "quantize")),
    (2, "run/layout.json", JSON, ("report", "allocate", "verify", "explain")),
    (2, "run/measured.json", JSON, ("status", "report", "allocate", "quantize")),
    (1, "run/device.json", JSON, ("report",)),
    (2, "run/plans/*.json", JSON, ("report", "allocate", "quantize", "sweep")),
    (2, "run/*ward/*/record.json", JSON, ("status", "report", "allocate", "explain")),
    (1, "run/calibration/record.json", JSON, ("report", "quantize")),
    (1, "run/*ward/*/*/*.safetensors", TENSORS, ("assemble", "verify")),
    (1, "run/calibration/*/*.safetensors", TENSORS, ("report",)),
    (5, "run/events.jsonl", EVENTS, ("status", "status", "report", "quantize")),
    (6, "repository/prismaquant.json", JSON, ("verify", "assemble", "dequantize", "publish")),
    (5, "repository/model.safetensors.index.json", JSON, ("verify", "dequantize", "evaluate", "publish")),
    (8, "repository/config.json", JSON, ("verify", "dequantize", "dequantize", "evaluate", "publish")),
    (3, "repository/tokenizer*.json", JSON, ("verify", "evaluate", "publish")),
    (1, "repository/generation_config.json", JSON, ("verify", "evaluate", "dequantize")),
    (8, "repository/*.safetensors", TENSORS, ("verify", "verify", "dequantize", "evaluate", "publish")),
    (8, "source/config.json", JSON, ("inspect", "inspect", "evaluate", "formats", "doctor")),
    (2, "source/model.safetensors.index.json", JSON, ("inspect", "allocate", "doctor")),
    (2, "source/tokenizer*.json", JSON, ("deep", "evaluate")),
    (4, "source/*.safetensors", TENSORS, ("inspect", "allocate", "deep", "doctor")),
    (4, "config.yaml", YAML, ("formats", "inspect", "allocate", "doctor")),
    (4, "", OVERRIDES, ("formats", "inspect", "allocate", "doctor")),
)


class Bench:
    """A finished run that is copied into place before every case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.kept = folder / "kept"
        self.written: list[str] = []

    def prepare(self) -> None:
        """A run, its repository, and its source, as every case finds them."""
        from tests.runs import configuration, quantized
        from tests.tiny import make_checkpoint, make_text

        sizes = {"hidden": 32, "intermediate": 64, "heads": 2, "kv_heads": 1, "layers": 1, "shards": 2}
        source = make_checkpoint(self.work / "source", "llama_untied", **sizes)
        overrides = ("sweep=[5.0, 6.0]", "rounding.scale_search.grid=2", "rounding.gptq=null")
        quantized(configuration(self.work, source, *overrides, sequences=2, characters=1500))
        body = json.loads((self.work / "config.yaml").read_text())
        body |= {"sweep": [5.0, 6.0], "rounding": {"scale_search": {"grid": 2}, "gptq": None}}
        (self.work / "config.yaml").write_text(json.dumps(body))
        make_text(self.work / "evaluation", 500, seed=9)
        shutil.copytree(self.work, self.kept, symlinks=True)

    def restore(self) -> None:
        """Everything as it was."""
        shutil.rmtree(self.work)
        shutil.copytree(self.kept, self.work, symlinks=True)

    def command(self, name: str, overrides: tuple[str, ...]) -> list[str]:
        """The words of a command line."""
        work = self.work
        if name == "status":
            return ["status", f"{work}/run"]
        if name == "dequantize":
            return ["dequantize", f"{work}/repository", f"{work}/decoded"]
        if name == "publish":
            return ["publish", f"{work}/repository", "hf://lab/broken"]
        if name == "evaluate":
            places = f"--source {work}/source --text {work}/evaluation/text.txt --store {work}/evaluated"
            return ["evaluate", f"{work}/repository", *places.split(), "--sequences", "1", "--length", "8"]
        words = {"deep": ["inspect", "--deep"], "explain": ["explain"]}.get(name, [name])
        named = ["model.layers.0.mlp.down_proj"] if name == "explain" else []
        return [*words, f"{work}/config.yaml", *named, *(f"--set={override}" for override in overrides)]

    def watch(self) -> None:
        """Note what is opened to be written, made or removed outside the folder, for as long as this process lives."""
        # Rust writes below a store's prefix only: its paths are parsed.
        changing = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate"}

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, mode, flags = arguments
                if not (isinstance(mode, str) and set(mode) & set("wax+")) and not (flags & (os.O_WRONLY | os.O_RDWR)):
                    return
            elif event in changing:
                path = arguments[0]
            else:
                return
            if isinstance(path, str | bytes | Path):
                place = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
                if not place.startswith((f"{self.folder}/", "/dev/", "/proc/")):
                    self.written.append(f"{event} {place}")

        sys.addaudithook(hook)


def cases(seed: int, count: int) -> Iterator[tuple[random.Random, str, Mutation, str]]:
    """What to break, how, and the command behind it; every pattern comes, every mutation of a kind in turn."""
    dice = random.Random(seed)
    patterns = [case for case in CASES for _ in range(case[0])]
    turns = {case[1]: dice.randrange(100) for case in CASES}
    for number in range(count):
        if number % len(patterns) == 0:
            dice.shuffle(patterns)
        _, pattern, mutations, commands = patterns[number % len(patterns)]
        turns[pattern] += 1
        yield dice, pattern, mutations[turns[pattern] % len(mutations)], dice.choice(commands)


def run(bench: Bench, seed: int, count: int, tell: Callable[[dict[str, Any]], None], only: int | None = None) -> None:
    """Every case; `only` one of them, with what it prints."""
    from click.testing import CliRunner

    from jobs.command_line import cli

    for number, (dice, pattern, mutation, name) in enumerate(cases(seed, count)):
        own = random.Random(dice.random())
        if only is not None and number != only:
            continue
        bench.restore()
        target = None
        if pattern:
            target = own.choice(sorted(bench.work.glob(pattern)))
        overrides = mutation.apply(target, own) or ()
        what = f"{pattern or 'settings'}: {mutation.name} {str(overrides or '')[:80]} → {name}"
        tell({"number": number, "case": what})
        bench.written.clear()
        # The peak begins anew.
        Path("/proc/self/clear_refs").write_text("5")
        before = outside(bench)
        started = time.process_time()
        result = CliRunner().invoke(cli, bench.command(name, overrides))
        taken = time.process_time() - started
        left = sorted(outside(bench) ^ before)
        if target is None or target.name == "config.yaml":
            # A setting may be a place here.
            left = [place for place in left if not place.startswith(f"{bench.folder}/here/")]
        told = {
            "exit": result.exit_code if isinstance(result.exception, SystemExit | None) else str(result.exception),
            "seconds": round(taken, 3),
            "peak_bytes": peak(),
            "named": any(word in result.stderr for word in names_of(bench, target, overrides)),
            "lines": result.stderr.splitlines(),
            "said": result.output[:1000],
            "written": [*bench.written, *left],
        }
        if not isinstance(result.exception, SystemExit | None):
            told["traceback"] = "".join(traceback.format_exception(result.exception))
        tell({"number": number, "case": what, **told})
        if only is not None:
            sys.stdout.write(result.output)
            again = CliRunner().invoke(cli, [*bench.command(name, overrides), "--debug"])
            if again.exception is not None:
                traceback.print_exception(again.exception)


def names_of(bench: Bench, target: Path | None, overrides: tuple[str, ...]) -> list[str]:
    """What an error may name: the file, its place, a setting, or its value."""
    parts = [override.partition("=") for override in overrides]
    keys = [word for key, _, value in parts for word in (key.rpartition(".")[2], value)]
    sections = ["calibration.", "evaluation.", "model.", "store."] if target and target.name == "config.yaml" else []
    return [str(bench.work), *([target.name] if target else []), *sections, "--set", *(key for key in keys if key)]


def outside(bench: Bench) -> set[str]:
    """Everything in the folder of this process, but for the work folder."""
    found: set[str] = set()
    for place, folders, files in os.walk(bench.folder):
        if Path(place) == bench.folder:
            folders.remove("work")
        found |= {f"{place}/{name}" for name in [*folders, *files]}
    return found


def main(folder: Path, seed: int, count: int, only: int | None = None) -> None:
    """Make the run, break it, tell."""
    for name in ("tmp", "home", "here"):
        (folder / name).mkdir(parents=True)
    (port,) = free_ports(1)
    os.environ.update(TMPDIR=f"{folder}/tmp", HOME=f"{folder}/home", HF_HUB_DISABLE_XET="1")
    # The hub's client reads this once, when it is imported.
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"
    from tests.hub_server import TOKEN, HubServer

    os.environ["HF_TOKEN"] = TOKEN
    hub = HubServer(port=port)
    os.chdir(folder / "here")
    # Drawing takes seconds and reads nothing.
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    from actors import diagnosis
    from jobs.pipeline.diagnosis import doctor
    from jobs.pipeline.repository_evaluation import evaluate
    from jobs.pipeline.run import Run
    from tests.inprocess import in_process

    # Rates are not the question.
    diagnosis._PRODUCT["cpu"], diagnosis._ENCODED["cpu"] = 64, (32, 128)
    diagnosis._COPIED = diagnosis._STORED = 1 << 12
    for function in (Run.__init__, doctor, evaluate):
        assert function.__kwdefaults__ is not None
        function.__kwdefaults__["open_workers"] = in_process()

    def tell(body: dict[str, Any]) -> None:
        sys.stdout.write(f"{json.dumps(body)}\n")
        sys.stdout.flush()

    bench = Bench(folder)
    bench.prepare()
    with hub:
        for name in (
            "inspect",
            "deep",
            "evaluate",
            "dequantize",
            "verify",
            "report",
            "sweep",
            "explain",
            "publish",
            "doctor",
        ):
            from click.testing import CliRunner

            from jobs.command_line import cli

            result = CliRunner().invoke(cli, bench.command(name, ()))
            assert result.exit_code == 0, (name, result.output)
        bench.watch()
        started = time.process_time()
        run(bench, seed, count, tell, only)
        tell({"seconds": round(time.process_time() - started, 1), "cases": count})


def peak() -> int:
    """The most memory that this process has held."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
