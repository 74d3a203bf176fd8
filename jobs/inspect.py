"""`inspect`: what would happen, from headers only."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console

from jobs import inputs
from jobs.run import Run
from prismaquant_ray.config import Config


def run(config: Config) -> dict[str, Any]:
    """Layout, candidates, budget bounds, memory and disk plan. Refuses what cannot fit."""
    current = Run(config)
    layout, sizes = current.layout, current.sizes
    limit = sizes.limit(config.budget)
    required = current.needs
    inputs.check_room(config, required)
    groups = Counter(group.name.rpartition(".")[2] for group in layout.groups)
    allowed = {str(name): int(sizes.allowed[:, column].sum()) for column, name in enumerate(sizes.formats)}
    return {
        "architecture": layout.architecture,
        "family": layout.family,
        "guesses": list(layout.guesses),
        "blocks": len(layout.blocks),
        "quantizable_parameters": layout.parameters,
        "source_bytes": sum(info.nbytes for info in current.source.tensors.values()),
        "groups": dict(groups),
        "groups_per_format": allowed,
        "kept": dict(layout.kept),
        "budget_bytes": limit,
        "needs": required.as_dict(),
        "workers": inputs.expected_workers(config),
    }


def render(result: dict[str, Any], console: Console) -> None:
    """The plan, for people."""
    console.print(
        f"{result['architecture']} (family {result['family']}): {result['blocks']} blocks, "
        f"{result['quantizable_parameters'] / 1e6:,.1f} M quantizable parameters, source "
        f"{result['source_bytes'] / 1e6:,.1f} MB"
    )
    for guess in result["guesses"]:
        console.print(f"  guess: {guess}")
    console.print("  fused groups: " + ", ".join(f"{count} {name}" for name, count in result["groups"].items()))
    console.print("  can take: " + ", ".join(f"{count} {name}" for name, count in result["groups_per_format"].items()))
    for name, reason in result["kept"].items():
        console.print(f"  kept: {name} ({reason})")
    needs = result["needs"]
    parts = ", ".join(
        f"{name.removeprefix('worker_')} {size / 1e9:.2f}" for name, size in needs.items() if name.startswith("worker_")
    )
    console.print(f"  memory: {result['workers']} workers of {needs['worker'] / 1e9:.2f} GB ({parts})")
    console.print(f"  disk: run store {needs['run_store'] / 1e9:.2f} GB, repository {needs['repository'] / 1e9:.2f} GB")
