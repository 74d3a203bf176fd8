"""`prismaquant-ray COMMAND CONFIG.yaml [--set key=value …] [--json]`, also `python -m jobs COMMAND …`.

`status` takes the run store in place of CONFIG, `dequantize` a repository and an output.

Commands are imported when they run: `--help` answers without torch.
"""

from __future__ import annotations

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

    Every command but `status` and `dequantize` takes the same CONFIG and runs what it needs and is missing. Exit codes:
    0 done, 2 the input, 3 the environment, 1 a bug, 130 or 143 stopped by Ctrl-C or SIGTERM.
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
        from jobs import status

        return _show(status, status.run(uri), as_json)

    sys.exit(_guarded(show, debug=debug))


@cli.command("dequantize", help="The BF16 weights of a compressed-tensors repository, as a repository at OUT.")
@click.argument("repo")
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _dequantize(repo: str, out: str, as_json: bool, debug: bool) -> None:
    def write() -> int:
        from jobs import dequantize

        return _show(dequantize, dequantize.run(repo, out), as_json)

    sys.exit(_guarded(write, debug=debug))


def _execute(name: str, path: Path | None, overrides: tuple[str, ...], as_json: bool, options: dict[str, bool]) -> int:
    from prismaquant_ray.config import load

    config = load(path, overrides) if path is not None else None
    module = importlib.import_module(f"jobs.{name}")
    return _show(module, module.run(config, **options), as_json)


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
