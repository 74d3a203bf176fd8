"""Commands in a process that must end without what only models need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_CODE = """
import json, sys
from click.testing import CliRunner
from jobs.command_line import cli

for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, (arguments, result.output)
    heavy = {"torch", "ray", "transformers", "compressed_tensors"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
    print(json.dumps(result.stdout))
"""


def light(*commands: tuple[object, ...], environment: Mapping[str, str] = os.environ) -> list[str]:
    """What each command prints, one after the other in one process."""
    listed = json.dumps([[str(argument) for argument in arguments] for arguments in commands])
    done = subprocess.run(
        [sys.executable, "-c", _CODE, listed], env=environment, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
