"""The plan of a run, from headers only: layout, candidates, budget, memory and disk."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from actors.connect import joins
from actors.memory import planned_of
from actors.memory_plan import MemoryPlan, ShardSize, shard_size
from jobs.pipeline import checks
from jobs.pipeline.run import Run
from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.allocation.constraints import restricted
from prismaquant_ray.config import Config
from prismaquant_ray.config_values import parse_bytes
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint
from prismaquant_ray.records import ServerMemory
from prismaquant_ray.source.protocol import TensorSource

_MACHINE = re.compile(r"(\d+)x(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class MachinePlan:
    """The plan of a run on `workers` devices of a given size, e.g. 8x80GB; sizes in bytes.

    `fitting` blocks fit on a device; `wanted` blocks per shard give every worker enough visits.
    """

    machine: str
    workers: int
    fits: bool
    blocks_per_shard: int
    fitting: int
    wanted: int
    worker_bytes: int
    run_store_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Properties of a run before it measures. Sizes in bytes.

    `groups` counts fused groups by the last part of their name, `groups_per_format` those that can take a format.
    `kept` has the reason for every unquantized module; `vram` is that of the largest plan in the budget.
    """

    architecture: str
    family: str
    guesses: list[str]
    blocks: int
    quantizable_parameters: int
    source_bytes: int
    groups: dict[str, int]
    groups_per_format: dict[FormatName, int]
    kept: dict[str, str]
    budget_bytes: int
    vram: ServerMemory | None
    restricted_groups: int
    dtype: str
    needs: MemoryPlan
    workers: int
    on_this_machine: bool
    blocks_per_shard: ShardSize
    worker_bytes: int
    run_store_bytes: int
    machines: list[MachinePlan]


def inspect(config: Config, *, machines: Sequence[str] = ()) -> Inspection:
    """Layout, candidates, budget bounds, memory and disk plan.

    With `machines`, e.g. 8x80GB, the plan is for those instead of this one, and weights may be missing.

    Raises:
        InputError: the configuration cannot be used, or its run cannot fit on this machine.
    """
    others = [_machine(machine) for machine in machines]
    run = Run(config, weights=False)
    layout, sizes = run.layout, run.sizes
    limit = sizes.limit(config.budget)
    plan = run.memory_plan
    workers = checks.expected_workers(config)
    if others:
        size = shard_size(plan, config, workers=workers, free=checks.free_device_memory(config) // workers)
    else:
        size = checks.check_room(config, plan)
    return Inspection(
        architecture=layout.architecture,
        family=layout.family,
        guesses=[*layout.guesses, *_assumed(run.source)],
        blocks=len(layout.blocks),
        quantizable_parameters=layout.parameters,
        source_bytes=sum(info.nbytes for info in run.source.stored.values()),
        groups=dict(Counter(group.name.rpartition(".")[2] for group in layout.groups)),
        groups_per_format={name: int(sizes.allowed[:, column].sum()) for column, name in enumerate(sizes.formats)},
        kept=dict(layout.ignored),
        budget_bytes=limit,
        vram=None if sizes.serving is None else sizes.serving.memory(sizes.loaded(_stored(sizes, config, limit))),
        restricted_groups=restricted(sizes, layout),
        dtype=run.config.model.dtype,
        needs=plan,
        workers=workers,
        on_this_machine=not joins(config.cluster),
        blocks_per_shard=size,
        worker_bytes=plan.worker(size.blocks),
        run_store_bytes=plan.run_store(size.blocks),
        machines=[_plan(config, plan, machine, *other) for machine, other in zip(machines, others, strict=True)],
    )


def _stored(sizes: Sizes, config: Config, limit: int) -> int:
    """Upper bound on the bytes of candidates; `bpp` does not count scalars, so the most scalars are added."""
    return limit if config.budget.bpp is None else limit + int((sizes.stored - sizes.weights).max(axis=1).sum())


def _machine(text: str) -> tuple[int, int]:
    """Number of workers and bytes per worker from 8x80GB."""
    found = _MACHINE.fullmatch(text)
    try:
        count, size = (int(found[1]), parse_bytes(found[2])) if found else (0, 0)
    except ValueError as error:
        raise InputError(f"--for {text}: {error}") from error
    if count < 1 or size < 1:
        raise InputError(f"--for {text}: write how many devices of how much memory, e.g. 8x80GB")
    return count, size


def _plan(config: Config, plan: MemoryPlan, machine: str, workers: int, memory: int) -> MachinePlan:
    """The plan for a machine with `workers` GPUs of `memory` bytes each."""
    elsewhere = config.model_copy(update={"cluster": config.cluster.model_copy(update={"memory": "auto"})})
    memory = planned_of(memory)
    size = shard_size(plan, elsewhere, workers=workers, free=memory)
    blocks = max(1, size.blocks)
    return MachinePlan(
        machine=machine,
        workers=workers,
        fits=plan.worker(blocks) <= memory,
        blocks_per_shard=blocks,
        fitting=max(0, size.fitting),
        wanted=size.wanted,
        worker_bytes=plan.worker(blocks),
        run_store_bytes=plan.run_store(blocks),
    )


def _assumed(source: TensorSource) -> Iterator[str]:
    """Assumptions made because there are no weights."""
    if isinstance(source, ConfigOnlyCheckpoint):
        yield "no weights are there: names and shapes are those of the configuration, in BF16"
        names = source.unexplained()
        if names:
            yield f"the index names {len(names)} tensors that the configuration does not explain, {names[0]} the first"
