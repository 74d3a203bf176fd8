"""`inspect`: what would happen, from headers only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from actors.connect import joins
from actors.memory_plan import MemoryPlan, shard_size
from actors.schedule.shards import SHARDS_PER_WORKER
from jobs import inputs
from jobs.allocate import memory
from jobs.run import Run
from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.allocation.constraints import restricted
from prismaquant_ray.config import Config, parse_bytes
from prismaquant_ray.errors import InputError
from prismaquant_ray.formatting import gigabytes
from prismaquant_ray.source.protocol import TensorSource

_MACHINE = re.compile(r"(\d+)x(.+)")


def run(config: Config, *, machines: Sequence[str] = ()) -> dict[str, Any]:
    """Layout, candidates, budget bounds, memory and disk plan. Refuses what cannot fit on this machine.

    With `machines`, e.g. 8x80GB, the plan is for those instead; no weights need to be there.
    """
    others = [_machine(machine) for machine in machines]
    current = Run(config, weights=False)
    layout, sizes = current.layout, current.sizes
    limit = sizes.limit(config.budget)
    required = current.memory_plan
    workers = inputs.expected_workers(config)
    if others:
        size = shard_size(required, config, workers=workers, free=inputs.free_device_memory(config) // workers)
    else:
        size = inputs.check_room(config, required)
    groups = Counter(group.name.rpartition(".")[2] for group in layout.groups)
    allowed = {str(name): int(sizes.allowed[:, column].sum()) for column, name in enumerate(sizes.formats)}
    return {
        "architecture": layout.architecture,
        "family": layout.family,
        "guesses": [*layout.guesses, *_without_weights(current.source)],
        "blocks": len(layout.blocks),
        "quantizable_parameters": layout.parameters,
        "source_bytes": sum(info.nbytes for info in current.source.stored.values()),
        "groups": dict(groups),
        "groups_per_format": allowed,
        "kept": dict(layout.ignored),
        "budget_bytes": limit,
        "vram": None if sizes.serving is None else sizes.serving.described(sizes.loaded(_stored(sizes, config, limit))),
        "restricted_groups": restricted(sizes, layout),
        "needs": required.as_dict(),
        "workers": workers,
        "on_this_machine": not joins(config.cluster),
        "blocks_per_shard": asdict(size),
        "worker_bytes": required.worker(size.blocks),
        "run_store_bytes": required.run_store(size.blocks),
        "machines": [_plan(config, required, machine, *other) for machine, other in zip(machines, others, strict=True)],
    }


def _stored(sizes: Sizes, config: Config, limit: int) -> int:
    """Most bytes of candidates within the budget; in `bpp` their scalars do not count, so all are added."""
    return limit if config.budget.bpp is None else limit + int((sizes.stored - sizes.weights).max(axis=1).sum())


def _machine(text: str) -> tuple[int, int]:
    """Workers and bytes of each from 8x80GB."""
    found = _MACHINE.fullmatch(text)
    try:
        count, size = (int(found[1]), parse_bytes(found[2])) if found else (0, 0)
    except ValueError as error:
        raise InputError(f"--for {text}: {error}") from error
    if count < 1 or size < 1:
        raise InputError(f"--for {text}: write how many devices of how much memory, e.g. 8x80GB")
    return count, size


def _plan(config: Config, required: MemoryPlan, machine: str, workers: int, memory: int) -> dict[str, Any]:
    """What a worker would do on a machine with that many devices."""
    elsewhere = config.model_copy(update={"cluster": config.cluster.model_copy(update={"memory": "auto"})})
    size = shard_size(required, elsewhere, workers=workers, free=memory)
    blocks = max(1, size.blocks)
    return {
        "machine": machine,
        "workers": workers,
        "fits": required.worker(blocks) <= memory,
        "blocks_per_shard": blocks,
        "fitting": max(0, size.fitting),
        "wanted": size.wanted,
        "worker_bytes": required.worker(blocks),
        "run_store_bytes": required.run_store(blocks),
    }


def _without_weights(source: TensorSource) -> Iterator[str]:
    """What was taken for granted because there are no weights."""
    from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint

    if isinstance(source, ConfigOnlyCheckpoint):
        yield "no weights are there: names and shapes are those of the configuration, in BF16"
        names = source.unexplained()
        if names:
            yield f"the index names {len(names)} tensors that the configuration does not explain, {names[0]} the first"


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
    by_reason: dict[str, list[str]] = {}
    for name, reason in result["kept"].items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(f"  kept: {names[0]}{more} ({reason})")
    if result["restricted_groups"]:
        console.print(f"  allocation.force and floor leave {result['restricted_groups']} groups fewer formats")
    if result["vram"] is not None:
        console.print(f"  vram, of the largest plan in the budget: {memory(result['vram'])}")
    needs, size = result["needs"], result["blocks_per_shard"]
    console.print(
        f"  a block: {gigabytes(needs['block'])} = weights {gigabytes(needs['block_weights'])} + the larger of "
        f"Hessians {gigabytes(needs['block_hessians'])} and candidates {gigabytes(needs['block_candidates'])} with "
        f"activations {gigabytes(needs['block_activations'])}"
    )
    if result["machines"]:
        _render_machines(result, console)
        return
    console.print(
        f"  blocks per shard: {size['blocks']}"
        + (" as configured; " if size["configured"] else "; ")
        + f"{max(0, size['fitting'])} fit into {gigabytes(size['free'])} ((free - process {gigabytes(needs['base'])} - "
        f"working {gigabytes(needs['working'])}) / block), "
        f"{size['wanted']} give every worker {SHARDS_PER_WORKER} visits"
    )
    if not result["on_this_machine"]:
        console.print("  (memory of this machine; on the cluster the first worker says what it has)")
    console.print(
        f"  memory: {result['workers']} workers of {gigabytes(result['worker_bytes'])} (process + working + the larger "
        f"of {size['blocks']} blocks and head {gigabytes(needs['exit'])})"
    )
    console.print(
        f"  disk: run store {gigabytes(result['run_store_bytes'])} at most, repository {gigabytes(needs['repository'])}"
    )


def _render_machines(result: dict[str, Any], console: Console) -> None:
    needs = result["needs"]
    console.print(
        f"  a worker: process {gigabytes(needs['base'])} + working {gigabytes(needs['working'])} + the larger of its "
        f"blocks and head {gigabytes(needs['exit'])}; repository {gigabytes(needs['repository'])}"
    )
    for plan in result["machines"]:
        if not plan["fits"]:
            console.print(
                f"  {plan['machine']}: does not fit, a worker needs {gigabytes(plan['worker_bytes'])}; lower "
                "calibration.microbatch, name fewer formats, or set model.dtype to bfloat16 if it is not"
            )
            continue
        console.print(
            f"  {plan['machine']}: {plan['workers']} workers of {gigabytes(plan['worker_bytes'])}, "
            f"{plan['blocks_per_shard']} blocks a shard ({plan['fitting']} fit, {plan['wanted']} give every worker "
            f"{SHARDS_PER_WORKER} visits), run store {gigabytes(plan['run_store_bytes'])} at most"
        )
