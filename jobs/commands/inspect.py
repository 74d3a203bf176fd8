"""`inspect`: the plan of a run, from headers only."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from actors.schedule.shards import SHARDS_PER_WORKER
from jobs.pipeline.inspection import Inspection, inspect
from prismaquant_ray.config import Config
from prismaquant_ray.formatting import gigabytes, server_memory


def run(config: Config, *, machines: Sequence[str] = ()) -> Inspection:
    """Layout, candidates, budget bounds, memory and disk plan. Refuses what cannot fit on this machine."""
    return inspect(config, machines=machines)


def render(result: Inspection, console: Console) -> None:
    """Print the plan."""
    console.print(
        f"{result.architecture} (family {result.family}): {result.blocks} blocks, "
        f"{result.quantizable_parameters / 1e6:,.1f} M quantizable parameters, source "
        f"{result.source_bytes / 1e6:,.1f} MB"
    )
    for guess in result.guesses:
        console.print(f"  guess: {guess}")
    console.print("  fused groups: " + ", ".join(f"{count} {name}" for name, count in result.groups.items()))
    console.print("  can take: " + ", ".join(f"{count} {name}" for name, count in result.groups_per_format.items()))
    by_reason: dict[str, list[str]] = {}
    for name, reason in result.kept.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(f"  kept: {names[0]}{more} ({reason})")
    if result.restricted_groups:
        console.print(f"  allocation.force and floor leave {result.restricted_groups} groups fewer formats")
    if result.vram is not None:
        console.print(f"  vram, of the largest plan in the budget: {server_memory(result.vram)}")
    needs = result.needs
    console.print(
        f"  a block: {gigabytes(needs.block)} = weights {gigabytes(needs.block_weights)} + the larger of Hessians "
        f"{gigabytes(needs.block_hessians)} and candidates {gigabytes(needs.block_candidates)} with activations "
        f"{gigabytes(needs.block_activations)}"
    )
    if result.machines:
        _render_machines(result, console)
    else:
        _render_this_machine(result, console)


def _render_this_machine(result: Inspection, console: Console) -> None:
    needs, size = result.needs, result.blocks_per_shard
    console.print(
        f"  blocks per shard: {size.blocks}"
        + (" as configured; " if size.configured else "; ")
        + f"{max(0, size.fitting)} fit into {gigabytes(size.free)} ((free - process {gigabytes(needs.base)} - working "
        f"{gigabytes(needs.working)}) / block), {size.wanted} give every worker {SHARDS_PER_WORKER} visits"
    )
    if not result.on_this_machine:
        console.print("  (memory of this machine; on the cluster the first worker says what it has)")
    console.print(
        f"  memory: {result.workers} workers of {gigabytes(result.worker_bytes)} (process + working + the larger of "
        f"{size.blocks} blocks and head {gigabytes(needs.exit)})"
    )
    console.print(
        f"  disk: run store {gigabytes(result.run_store_bytes)} at most, repository {gigabytes(needs.repository)}"
    )


def _render_machines(result: Inspection, console: Console) -> None:
    needs = result.needs
    console.print(
        f"  a worker: process {gigabytes(needs.base)} + working {gigabytes(needs.working)} + the larger of its blocks "
        f"and head {gigabytes(needs.exit)}; repository {gigabytes(needs.repository)}"
    )
    smaller = "" if result.dtype == "bfloat16" else ", set model.dtype to bfloat16"
    for plan in result.machines:
        if not plan.fits:
            console.print(
                f"  {plan.machine}: does not fit, a worker needs {gigabytes(plan.worker_bytes)}; lower "
                f"calibration.microbatch{smaller} or name fewer formats"
            )
            continue
        console.print(
            f"  {plan.machine}: {plan.workers} workers of {gigabytes(plan.worker_bytes)}, "
            f"{plan.blocks_per_shard} blocks a shard ({plan.fitting} fit, {plan.wanted} give every worker "
            f"{SHARDS_PER_WORKER} visits), run store {gigabytes(plan.run_store_bytes)} at most"
        )
