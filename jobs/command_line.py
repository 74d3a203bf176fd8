"""`prismaquant-ray COMMAND …`: parse, call the command, print its result.

Every command has a module in `jobs/commands` with `run`, which returns a dataclass, and `render`, which prints it for
people. A module is imported when its command runs: `--help` answers without torch.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from jobs.stopping import SIGNALS, STOPPED, Stopped
from prismaquant_ray import __version__
from prismaquant_ray.serialization import to_json


def _flag(name: str, text: str) -> click.Option:
    return click.Option([name], is_flag=True, help=text)


CONFIG = click.Argument(["config"], type=click.Path(path_type=Path))
OPTIONAL_CONFIG = click.Argument(["config"], type=click.Path(path_type=Path), required=False)
REPO = click.Argument(["repo"])
SET = click.Option(
    ["--set", "overrides"], multiple=True, metavar="KEY=VALUE", help="Override one setting, e.g. budget.bpp=5."
)
FRESH = _flag("--fresh", "Delete what store.run holds and start over.")
ON_EVERY_COMMAND = (
    click.Option(["--json", "as_json"], is_flag=True, help="Print the result as one JSON object."),
    _flag("--debug", "Show the traceback of an error."),
)
EVALUATION = (
    click.Option(["--source"], required=True, metavar="MODEL", help="The unquantized model: directory, URI or hub id."),
    click.Option(
        ["--text"],
        default="mix:all",
        show_default=True,
        metavar="SOURCE",
        help="Text that calibration has not seen: .txt, .jsonl, .parquet, hf://datasets/…, - or mix:KIND.",
    ),
    click.Option(["--images"], type=click.Path(path_type=Path), help="A JSONL file of images with captions."),
    click.Option(["--sequences"], type=click.IntRange(min=1), default=24, show_default=True),
    click.Option(
        ["--length"], type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a sequence."
    ),
    click.Option(["--max-kl"], type=float, metavar="NATS", help="End with exit code 4 where KL is larger."),
    click.Option(["--min-top1"], type=float, metavar="SHARE", help="… or where fewer tokens have the same top-1."),
    click.Option(["--store"], help="Where machines share what they need, and an interrupted evaluation continues."),
    click.Option(
        ["--set", "overrides"], multiple=True, metavar="KEY=VALUE", help="E.g. cluster.workers=8, model.dtype=…"
    ),
)


@dataclass(frozen=True, slots=True)
class Command:
    """A command: one line of help, and its own parameters."""

    help: str
    parameters: Sequence[click.Parameter] = (CONFIG, SET)


COMMANDS = {
    "inspect": Command(
        "Layout, formats per Linear, memory and disk plan. Reads headers only, but with --deep.",
        (
            CONFIG,
            SET,
            click.Option(["--for", "machines"], multiple=True, metavar="NxGPU", help="Plan for e.g. 8xH100 or 8x80GB."),
            _flag("--deep", "Also run a few tokens through one block of each structure."),
        ),
    ),
    "doctor": Command(
        "Devices, kernels, storage and memory of the cluster, tried; and the time a job would take.", (CONFIG, SET)
    ),
    "quantize": Command("Every stage: measure, encode, choose, assemble, verify. Resumes.", (CONFIG, SET, FRESH)),
    "probe": Command("Measure and encode only: the forward and the backward pass.", (CONFIG, SET, FRESH)),
    "allocate": Command("The plan for the budget, from stored measurements."),
    "sweep": Command(
        "A plan for every target of `sweep:`, and the knee of the frontier.",
        (CONFIG, SET, _flag("--measure", "Also evaluate every target and its baselines (evaluation:).")),
    ),
    "assemble": Command("The repository for the budget's plan, verified.", (CONFIG, SET, FRESH)),
    "verify": Command("Re-read the repository: names, routing, bytes, sizes."),
    "report": Command(
        "What was found: one HTML page, its JSON and PNGs, in the run store or in --out.",
        (CONFIG, SET, click.Option(["--out"], metavar="DIR", help="Write it there instead.")),
    ),
    "export-recipe": Command(
        "The budget's plan as an llm-compressor recipe and a ModelOpt configuration, in OUT.",
        (
            CONFIG,
            click.Argument(["out"]),
            SET,
            click.Option(
                ["--for", "tools"],
                multiple=True,
                type=click.Choice(["llm-compressor", "modelopt"]),
                help="One of them only.",
            ),
        ),
    ),
    "explain": Command(
        "Why a module has its format: its price per byte in each, or why it cannot be quantized.",
        (CONFIG, click.Argument(["name"]), SET),
    ),
    "formats": Command("What every format stores and what it needs. CONFIG is optional.", (OPTIONAL_CONFIG, SET)),
    "status": Command(
        "What a run store holds and what its driver last said, from anywhere that can read it.",
        (click.Argument(["uri"]),),
    ),
    "dequantize": Command(
        "The BF16 weights of a compressed-tensors repository, as a repository at OUT.", (REPO, click.Argument(["out"]))
    ),
    "evaluate": Command(
        "A quantized repository against the model it was made from: KL, perplexity, top-1.", (REPO, *EVALUATION)
    ),
    "publish": Command(
        "A finished repository to hf://org/name, s3://… or gs://…, compared afterwards. Resumes.",
        (
            REPO,
            click.Argument(["target"]),
            _flag("--public", "On the hub: let everybody read it. Otherwise it is made private."),
        ),
    ),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Mixed-precision quantization of large language models as a Ray job.

    Every command but `status`, `dequantize`, `evaluate` and `publish` takes the same CONFIG and runs what it needs and
    is missing. Exit codes: 0 done, 2 the input, 3 the environment, 4 a limit of
    `evaluate` missed, 1 a bug, 129, 130 or 143 stopped by SIGHUP, Ctrl-C or SIGTERM.
    """


def _execute(name: str, /, *, as_json: bool, debug: bool, **values: Any) -> None:
    """Run a command; report an error as one line and an exit code."""
    from prismaquant_ray.errors import PrismaquantError, WorkerBugError

    try:
        sys.exit(_run(name, values, as_json=as_json))
    except KeyboardInterrupt as stopped:
        if stopped.__cause__ is not None:
            click.echo(f"while stopping: {_line(stopped.__cause__) or type(stopped.__cause__).__name__}", err=True)
        click.echo(STOPPED, err=True)
        sys.exit(stopped.exit_code if isinstance(stopped, Stopped) else 130)
    except PrismaquantError as error:
        if debug:
            raise
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        # The outermost frame: any other exception is a bug of ours. It ends the command.
        if debug:
            raise
        shown = _line(error) if isinstance(error, WorkerBugError) else f"{type(error).__name__}: {_line(error)}"
        click.echo(f"bug: {shown} (run again with --debug for the traceback)", err=True)
        sys.exit(1)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _run(name: str, values: dict[str, Any], *, as_json: bool) -> int:
    if "config" in values:
        path, overrides = values["config"], values.pop("overrides")
        values["config"] = None if path is None else _imported("prismaquant_ray.config").load_config(path, overrides)
    module = _imported(f"jobs.commands.{name.replace('-', '_')}")
    return SIGNALS.run(lambda: _call(module, values, as_json=as_json))


def _call(module: Any, values: dict[str, Any], *, as_json: bool) -> int:
    result = module.run(**values)
    if as_json:
        click.echo(json.dumps(to_json(result), indent=1))
    else:
        from rich.console import Console

        # A log has no width of its own; tables should not be folded to 80 columns there.
        module.render(result, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    return int(getattr(result, "exit_code", 0))


def _imported(name: str) -> Any:
    """Import a module with the garbage collector off: collecting takes a fifth of the import time and frees nothing."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _add(name: str, command: Command) -> None:
    def callback(**values: Any) -> None:
        _execute(name, **values)

    parameters = [*command.parameters, *ON_EVERY_COMMAND]
    cli.add_command(click.Command(name, callback=callback, params=parameters, help=command.help))


for _name, _command in COMMANDS.items():
    _add(_name, _command)
