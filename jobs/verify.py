"""`verify`: re-read the repository at `store.output` against the run and the source."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from jobs import inputs
from jobs.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.repository.shards import MANIFEST, is_dequantized
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.storage.store import Store


def run(config: Config) -> dict[str, Any]:
    """Check the repository that is there, whatever budget it was made for. Exit code 2 when it is wrong."""
    output = config.store.output
    if not inputs.exists(output, MANIFEST):
        raise InputError(f"store.output {output} is not a repository of ours; run assemble first")
    store = Store(output, create=False)
    if is_dequantized(store.get(MANIFEST)):
        raise InputError(f"store.output {output} is a dequantized repository; verify the quantized one")
    try:
        manifest = json.loads(store.get(MANIFEST))
    except ValueError as error:
        raise InputError(f"store.output {output}: {MANIFEST} is not JSON; run assemble again") from error
    if "choice" not in manifest:
        raise InputError(f"store.output {output} was not written to its end; run assemble again")
    current = Run(config)
    current.measure()
    choice = {group: FormatName(name) for group, name in manifest["choice"].items()}
    report = verify_repository(store, current.source, current.layout, choice, current.candidates)
    return {
        "repository": str(output),
        "ok": report.ok,
        "problems": list(report.problems),
        "linears": dict(report.linears),
        "tensors": report.tensors,
        "total_bytes": report.total_bytes,
        "bpp": report.bpp,
        "exit_code": 0 if report.ok else 2,
    }


def render(result: dict[str, Any], console: Console) -> None:
    """The verdict, then every problem."""
    counts = ", ".join(f"{count} {name}" for name, count in result["linears"].items() if count)
    verdict = "verified" if result["ok"] else f"{len(result['problems'])} problems"
    console.print(
        f"{result['repository']}: {verdict}; {result['tensors']} tensors, {counts} Linears, "
        f"{result['total_bytes'] / 1e6:,.1f} MB, {result['bpp']:.4f} bits per parameter"
    )
    for problem in result["problems"]:
        console.print(f"  {problem}")
