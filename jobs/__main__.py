"""`prismaquant-ray COMMAND CONFIG.yaml [--set key=value …] [--json]`, also `python -m jobs COMMAND …`.

`status` takes the run store in place of CONFIG, `dequantize` a repository and an output, `publish` a repository and a
target.

Commands are imported when they run: `--help` answers without torch.
"""

from __future__ import annotations

import gc
import importlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from prismaquant_ray import __version__

COMMANDS = {
    "inspect": "Layout, formats per Linear, memory and disk plan. Reads headers only.",
    "quantize": "Every stage: measure, encode, choose, assemble, verify. Resumes.",
    "probe": "Measure and encode only: the forward and the backward pass.",
    "allocate": "The plan for the budget, from stored measurements.",
    "sweep": "A plan for every target of `sweep:`, and the knee of the frontier.",
    "assemble": "The repository for the budget's plan, verified.",
    "verify": "Re-read the repository: names, routing, bytes, sizes.",
    "report": "What was found: one HTML page, its JSON and PNGs, in the run store or in --out.",
    "formats": "What every format stores and what it needs. CONFIG is optional.",
}
# Commands that may start a run over.
_MEASURING = ("quantize", "probe", "assemble")


class Stopped(KeyboardInterrupt):
    """SIGTERM, as `ray job stop` and Kubernetes send it: end like Ctrl-C, in order, with what is done kept."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Mixed-precision quantization of large language models as a Ray job.

    Every command but `status`, `dequantize`, `evaluate` and `publish` takes the same CONFIG and runs what it needs and
    is missing. Exit codes: 0 done, 2 the input, 3 the environment, 1 a bug, 130 or 143 stopped by Ctrl-C or SIGTERM.
    """


def _add(name: str, help_text: str) -> None:
    def command(config: Path | None, overrides: tuple[str, ...], as_json: bool, debug: bool, **options: Any) -> None:
        sys.exit(_guarded(lambda: _execute(name, config, overrides, as_json, options), debug=debug))

    decorators = [
        click.argument("config", type=click.Path(path_type=Path), required=name != "formats"),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting, e.g. budget.bpp=5."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    ]
    if name in _MEASURING:
        decorators.append(click.option("--fresh", is_flag=True, help="Delete what store.run holds and start over."))
    if name == "sweep":
        decorators.append(
            click.option("--measure", is_flag=True, help="Also evaluate every target and its controls (evaluation:).")
        )
    if name == "report":
        decorators.append(click.option("--out", metavar="DIR", help="Write it there instead."))
    if name == "inspect":
        decorators.append(
            click.option("--for", "machines", multiple=True, metavar="NxSIZE", help="Plan for e.g. 8x80GB instead.")
        )
    for decorator in reversed(decorators):
        command = decorator(command)
    cli.command(name, help=help_text)(command)


for _name, _help in COMMANDS.items():
    _add(_name, _help)


@cli.command("status", help="What a run store holds and what its driver last said, from anywhere that can read it.")
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _status(uri: str, as_json: bool, debug: bool) -> None:
    def show() -> int:
        return _show(module := _imported("jobs.status"), module.run(uri), as_json)

    sys.exit(_guarded(show, debug=debug))


@cli.command("dequantize", help="The BF16 weights of a compressed-tensors repository, as a repository at OUT.")
@click.argument("repo")
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _dequantize(repo: str, out: str, as_json: bool, debug: bool) -> None:
    def write() -> int:
        return _show(module := _imported("jobs.dequantize"), module.run(repo, out), as_json)

    sys.exit(_guarded(write, debug=debug))


@cli.command("publish", help="A finished repository to hf://org/name, s3://… or gs://…, compared afterwards. Resumes.")
@click.argument("repo")
@click.argument("target")
@click.option("--public", is_flag=True, help="On the hub: let everybody read it. Otherwise it is made private.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _publish(repo: str, target: str, public: bool, as_json: bool, debug: bool) -> None:
    def send() -> int:
        return _show(module := _imported("jobs.publish"), module.run(repo, target, public=public), as_json)

    sys.exit(_guarded(send, debug=debug))


@cli.command("evaluate", help="A quantized repository against the model it was made from: KL, perplexity, top-1.")
@click.argument("repo")
@click.option("--source", required=True, metavar="MODEL", help="The unquantized model: a directory, URI or hub id.")
@click.option(
    "--text", required=True, type=click.Path(path_type=Path), help="Plain text that calibration has not seen."
)
@click.option("--images", type=click.Path(path_type=Path), help="A JSONL file of images with captions.")
@click.option("--sequences", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--store", help="Where machines share what they need, and an interrupted evaluation continues from.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="E.g. cluster.workers=8, model.dtype=…")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _evaluate(repo: str, as_json: bool, debug: bool, **options: Any) -> None:
    def measure() -> int:
        source, text = options.pop("source"), options.pop("text")
        return _show(module := _imported("jobs.evaluate"), module.run(repo, source, text, **options), as_json)

    sys.exit(_guarded(measure, debug=debug))


def _execute(name: str, path: Path | None, overrides: tuple[str, ...], as_json: bool, options: dict[str, bool]) -> int:
    config = _imported("prismaquant_ray.config").load(path, overrides) if path is not None else None
    module = _imported(f"jobs.{name}")
    return _show(module, module.run(config, **options), as_json)


def _imported(name: str) -> Any:
    """A module. Nothing that imports make is garbage, and looking for some takes a fifth of their time."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _show(module: Any, result: dict[str, Any], as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        from rich.console import Console

        # A log has no width of its own; tables should not be folded to 80 columns there.
        module.render(result, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    return int(result.get("exit_code", 0))


def _stop(*_: object) -> None:
    raise Stopped


def _guarded(call: Callable[[], int], *, debug: bool) -> int:
    """Run a command; turn what rises into one line and an exit code."""
    from prismaquant_ray.errors import PrismaquantError

    signal.signal(signal.SIGTERM, _stop)
    try:
        return call()
    except KeyboardInterrupt as stopped:
        click.echo("stopped; the same command continues", err=True)
        return 143 if isinstance(stopped, Stopped) else 130
    except PrismaquantError as error:
        if debug:
            raise
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        return error.exit_code
    except Exception as error:
        # The outermost frame: what nobody named is a bug of ours. It ends the command; nothing goes on after it.
        if debug:
            raise
        summary = " ".join(str(error).split())[:500]
        click.echo(f"bug: {type(error).__name__}: {summary} (run again with --debug for the traceback)", err=True)
        return 1


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="prismaquant-ray")


if __name__ == "__main__":
    main()
