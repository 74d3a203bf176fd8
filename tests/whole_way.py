"""A run and the commands after it in a process of its own: `python -m tests.whole_way DIRECTORY SOURCE BPP FORMAT…`.

Writes below DIRECTORY, and prints as JSON what every command says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from jobs.command_line import cli
from jobs.pipeline import stages
from prismaquant_ray.config import load_config
from tests.inprocess import in_process
from tests.runs import configuration


def said(*arguments: object) -> dict[str, Any]:
    """The JSON of a command that must succeed."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    body: dict[str, Any] = json.loads(result.stdout)
    return body


def main(directory: Path, source: Path, bpp: float, formats: list[str]) -> None:
    """Everything that a user does with a model, with every worker in this process."""
    configuration(directory, source, bpp=bpp, characters=8000)
    path = directory / "config.yaml"
    path.write_text(json.dumps({**json.loads(path.read_text()), "formats": formats}))
    found = {"formats": said("formats", path), "inspect": said("inspect", path)}
    done = stages.quantize(load_config(path), open_workers=in_process())
    found["quantize"] = {"groups": done.repository.plan.groups}
    plan = json.loads((directory / "repository/prismaquant.json").read_text())["choice"]
    found["explain"] = said("explain", path, next(iter(plan)))
    found |= {name: said(name, path) for name in ("report", "verify")}
    found["dequantize"] = said("dequantize", directory / "repository", directory / "decoded")
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
