"""`inspect`: the plan of a run, from headers only."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from actors.schedule.shards import SHARDS_PER_WORKER
from jobs.pipeline.cards import STORAGE, SUSTAINED_PRODUCTS, SUSTAINED_SINGLE
from jobs.pipeline.estimate import StageTime
from jobs.pipeline.inspection import Inspection, inspect
from prismaquant_ray.config import Config
from prismaquant_ray.formatting import gigabytes, seconds, server_memory, times_basis


def run(config: Config, *, machines: Sequence[str] = (), deep: bool = False) -> Inspection:
    """Layout, candidates, budget bounds, memory and disk plan. Refuses what cannot fit on this machine."""
    return inspect(config, machines=machines, deep=deep)


def render(result: Inspection, console: Console) -> None:
    """Print the plan."""
    console.print(
        f"{result.architecture} (family {result.family}): {result.blocks} blocks, "
        f"{result.quantizable_parameters / 1e6:,.1f} M quantizable parameters, source "
        f"{result.source_bytes / 1e6:,.1f} MB"
    )
    for fact in result.facts:
        console.print(f"  fact: {fact}")
    if result.preflight is not None:
        console.print(
            f"  preflight: a few tokens went through {', '.join(result.preflight.tried)}, forward and backward, in "
            f"{result.preflight.seconds:.1f} s"
        )
        equalized, unequal = result.preflight.equalized, result.preflight.unequal
        console.print(
            f"  equalization: {len(equalized)} of {len(equalized) + len(unequal)} inputs can take factors per channel"
            + (f"; not {', '.join(unequal)}" if unequal else "")
        )
    for guess in result.guesses:
        console.print(f"  guess: {guess}")
    console.print("  fused groups: " + ", ".join(f"{count} {name}" for name, count in result.groups.items()))
    console.print("  can take: " + ", ".join(f"{count} {name}" for name, count in result.groups_per_format.items()))
    for uniform in result.uniform:
        console.print(
            f"  all {uniform.format}: {uniform.bpp:.4f} bits per parameter, prefill {uniform.times.prefill:.3f}, "
            f"decode {uniform.times.decode:.3f}"
        )
    console.print(f"  (prefill and decode: relative to {times_basis(result.uniform[0].times)})")
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
    needs, on_gpus = result.needs, bool(result.machines) or result.blocks_per_shard.free.gpu
    block = needs.device.block if on_gpus else needs.block
    console.print(
        f"  a block: {gigabytes(block)} = weights {gigabytes(needs.block_weights)} + the larger of Hessians "
        f"{gigabytes(needs.block_hessians)} and candidates {gigabytes(needs.block_candidates)} with activations "
        f"{gigabytes(needs.block_activations)}"
    )
    if result.machines:
        _render_machines(result, console)
    else:
        _render_this_machine(result, console)


def _render_this_machine(result: Inspection, console: Console) -> None:
    needs, size = result.needs, result.blocks_per_shard
    free = " and ".join(f"{gigabytes(have)} of {name}" for name, (_, have) in needs.rooms(size.free).items())
    made_of = f"(free - process {gigabytes(needs.base)} - working {gigabytes(needs.working)}) / block"
    if size.free.gpu:
        made_of = f"(free - working {gigabytes(needs.device.fixed)} of the GPU) / block"
    console.print(
        f"  blocks per shard: {size.blocks}"
        + (" as configured; " if size.configured else "; ")
        + f"{max(0, size.fitting)} fit into {free} ({made_of}), {size.wanted} give every worker "
        f"{SHARDS_PER_WORKER} visits"
    )
    if not result.on_this_machine:
        console.print("  (memory of this machine; on the cluster the first worker says what it has)")
    terms, head = ("working", needs.device.exit) if size.free.gpu else ("process + working", needs.exit)
    console.print(
        f"  memory: {result.workers} workers of {gigabytes(result.worker_bytes)} ({terms} + the larger of "
        f"{size.blocks} blocks and head {gigabytes(head)})"
    )
    console.print(
        f"  disk: run store {gigabytes(result.run_store_bytes)} at most, repository {gigabytes(needs.repository)}"
    )


def _render_machines(result: Inspection, console: Console) -> None:
    needs = result.needs
    console.print(
        f"  a GPU: working {gigabytes(needs.device.fixed)} + the larger of its blocks and head "
        f"{gigabytes(needs.device.exit)}, in {result.dtype}; repository {gigabytes(needs.repository)}"
    )
    smaller = "" if result.dtype == "bfloat16" else ", set model.dtype to bfloat16"
    for plan in result.machines:
        if plan.lacking is not None:
            console.print(
                f"  {plan.machine}: does not fit, a worker needs {plan.lacking}; lower calibration.microbatch{smaller} "
                "or name fewer formats"
            )
            continue
        beside = f" and {gigabytes(plan.host_bytes)} of the host" if plan.host_bytes else ""
        console.print(
            f"  {plan.machine}: {plan.workers} workers of {gigabytes(plan.worker_bytes)}{beside}, "
            f"{plan.blocks_per_shard} blocks a shard ({plan.fitting} fit, {plan.wanted} give every worker "
            f"{SHARDS_PER_WORKER} visits), run store {gigabytes(plan.run_store_bytes)} at most"
        )
        if plan.stages:
            console.print("    " + time_of(plan.stages))
    if any(plan.stages for plan in result.machines):
        console.print(
            f"  (times are computed from data sheets: {SUSTAINED_PRODUCTS:.0%} of a card's products in BF16, "
            f"{SUSTAINED_SINGLE:.0%} of its float32, {STORAGE / 1e9:.0f} GB/s of storage for each worker; without "
            "attention, norms, starting and waiting; `doctor` measures)"
        )


def time_of(stages: Sequence[StageTime]) -> str:
    """Each stage and what bounds it, and all together."""
    each = ", ".join(
        f"{stage.stage} {seconds(stage.seconds)} ({'computation' if stage.compute >= stage.storage else 'storage'})"
        for stage in stages
    )
    return f"about {seconds(sum(stage.seconds for stage in stages))}: {each}"
