"""`assemble`: the repository for the budget's plan, verified before it is put in place."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from jobs import planning
from jobs.card import card_of
from jobs.run import Run
from prismaquant_ray import __version__
from prismaquant_ray.config import Config
from prismaquant_ray.errors import PrismaquantError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.repository.staging import check_output, staged_output
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.repository.writer import write_repository
from prismaquant_ray.source.checkpoint import INDEX
from prismaquant_ray.storage.connection import absolute
from prismaquant_ray.storage.prefix import Prefix


def run(config: Config, *, fresh: bool = False) -> dict[str, Any]:
    """Measure and allocate what is missing, then copy the chosen candidates."""
    current = Run(config, fresh=fresh)
    current.check()
    with current.claimed():
        current.measure()
        return current.repairing(lambda: build(current, planning.allocate(current)))


def build(current: Run, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Write, verify, publish. Nothing appears at `store.output` unless the repository is right."""
    started = time.monotonic()
    output = current.config.store.output
    check_output(output)
    choice = {group: FormatName(name) for group, name in plan["choice"].items()}
    used = {(current.layout.block_of[group].index, name) for group, name in choice.items() if FORMATS[name].codec}
    # Before anything is written: a damaged store is not a bug of the writer.
    current.candidates.check(sorted(used))
    manifest = {
        "prismaquant_ray": __version__,
        "target": plan["target"],
        "objective": plan["objective"],
        "predicted_loss": plan["predicted_loss"],
        "bpp": plan["bpp"],
    }
    with staged_output(output) as store:
        repository = write_repository(
            current.source,
            current.layout,
            choice,
            current.candidates,
            store,
            manifest=manifest,
            card=lambda written: card_of(current, plan, written),
        )
        report = verify_repository(store, current.source, current.layout, choice, current.candidates)
        if not report.ok:
            raise PrismaquantError(
                f"the repository is wrong ({report.problems[0]}); this is a bug, nothing was published"
            )
        _check_budget(current, store, repository.total_bytes)
    current.note(
        "repository",
        uri=absolute(output),
        target=plan["target"],
        bpp=repository.bpp,
        bytes=repository.total_bytes,
        seconds=round(time.monotonic() - started, 3),
    )
    return {
        "repository": str(output),
        "total_bytes": repository.total_bytes,
        "bpp": repository.bpp,
        "bits_all_parameters": repository.bits_all_parameters,
        "files": repository.files,
        "sha256": repository.sha256,
        "plan": {key: value for key, value in plan.items() if key != "choice"},
    }


def _check_budget(current: Run, store: Prefix, total_bytes: int) -> None:
    """What was written keeps the budget: every byte of the repository, or every tensor as a server loads it."""
    budget, serving = current.config.budget, current.sizes.serving
    exceeded = budget.bytes is not None and total_bytes > budget.bytes
    if budget.vram is not None:
        assert serving is not None
        loaded = json.loads(store.get(INDEX))["metadata"]["total_size"]
        exceeded = serving.needed(loaded) > budget.vram
    if exceeded:
        raise PrismaquantError(
            f"{total_bytes} bytes exceed the budget {budget.target}; this is a bug, nothing was published"
        )


def render(result: dict[str, Any], console: Console) -> None:
    """What was written, for people."""
    console.print(
        f"{result['repository']}: {result['total_bytes'] / 1e6:,.1f} MB, {result['bpp']:.4f} bits per quantizable "
        f"parameter, {result['bits_all_parameters']:.3f} per parameter of the whole model; verified"
    )
