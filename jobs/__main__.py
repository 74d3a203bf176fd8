"""`prismaquant-ray COMMAND CONFIG.yaml [--set key=value …] [--json]`, also `python -m jobs COMMAND …`.

Commands are imported when they run: `--help` answers without torch.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="prismaquant-ray")
def cli() -> None:
    """Mixed-precision quantization of large language models as a Ray job.

    Every command takes the same CONFIG and runs what it needs and is missing. Exit codes: 0 done, 2 the input,
    3 the environment, 1 a bug.
    """


def _add(name: str, help_text: str) -> None:
    @click.argument("config", type=click.Path(path_type=Path), required=name != "formats")
    @click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting, e.g. budget.bpp=5."
    )
    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    def command(config: Path | None, overrides: tuple[str, ...], as_json: bool, debug: bool) -> None:
        sys.exit(_guarded(lambda: _execute(name, config, overrides, as_json), debug=debug))

    cli.command(name, help=help_text)(command)


for _name, _help in COMMANDS.items():
    _add(_name, _help)


def _execute(name: str, path: Path | None, overrides: tuple[str, ...], as_json: bool) -> int:
    from prismaquant_ray.config import load

    config = load(path, overrides) if path is not None else None
    module = importlib.import_module(f"jobs.{name}")
    result: dict[str, Any] = module.run(config)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        from rich.console import Console

        # A log has no width of its own; tables should not be folded to 80 columns there.
        module.render(result, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    return int(result.get("exit_code", 0))


def _guarded(call: Callable[[], int], *, debug: bool) -> int:
    """Run a command; turn what rises into one line and an exit code."""
    from prismaquant_ray.errors import PrismaquantError

    try:
        return call()
    except KeyboardInterrupt:
        click.echo("stopped; the same command continues", err=True)
        return 130
    except PrismaquantError as error:
        if debug:
            raise
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        return error.exit_code
    except Exception as error:
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
