"""`inspect`: what would happen, from headers only."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.console import Console

from actors.cluster import joins
from actors.shards import VISITS
from jobs import inputs
from jobs.run import Run
from prismaquant_ray.config import Config


def run(config: Config) -> dict[str, Any]:
    """Layout, candidates, budget bounds, memory and disk plan. Refuses what cannot fit."""
    current = Run(config)
    layout, sizes = current.layout, current.sizes
    limit = sizes.limit(config.budget)
    required = current.needs
    size = inputs.check_room(config, required)
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
        "on_this_machine": not joins(config.cluster),
        "blocks_per_shard": asdict(size),
        "worker_bytes": required.worker(size.blocks),
        "run_store_bytes": required.run_store(size.blocks),
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
    needs, size = result["needs"], result["blocks_per_shard"]
    console.print(
        f"  a block: {_gb(needs['block'])} = weights {_gb(needs['block_weights'])} + the larger of Hessians "
        f"{_gb(needs['block_hessians'])} and candidates {_gb(needs['block_candidates'])} with activations "
        f"{_gb(needs['block_activations'])}"
    )
    console.print(
        f"  blocks per shard: {size['blocks']}"
        + (" as configured; " if size["configured"] else "; ")
        + f"{max(0, size['fitting'])} fit into {_gb(size['free'])} ((free - process {_gb(needs['base'])} - working "
        f"{_gb(needs['working'])}) / block), {size['wanted']} give every worker {VISITS} visits"
    )
    if not result["on_this_machine"]:
        console.print("  (memory of this machine; on the cluster the first worker says what it has)")
    console.print(
        f"  memory: {result['workers']} workers of {_gb(result['worker_bytes'])} (process + working + the larger of "
        f"{size['blocks']} blocks and head {_gb(needs['exit'])})"
    )
    console.print(f"  disk: run store {_gb(result['run_store_bytes'])} at most, repository {_gb(needs['repository'])}")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
