"""The plan of a run, from headers only: layout, candidates, budget, memory and disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from actors.connect import joins
from actors.context import loss_of
from actors.memory_plan import MemoryPlan, ShardSize, shard_size
from jobs.pipeline import checks
from jobs.pipeline.cards import Gpus
from jobs.pipeline.estimate import StageTime, estimate
from jobs.pipeline.run import Run
from prismaquant_ray.allocation.baselines import uniform_columns
from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.allocation.constraints import restricted
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FormatName, codecs_of
from prismaquant_ray.model.config_only import ConfigOnlyCheckpoint
from prismaquant_ray.model.layout_builder import scope_of
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.preflight import Preflight, preflight
from prismaquant_ray.records import PlanTimes, ServerMemory
from prismaquant_ray.source.protocol import TensorSource


@dataclass(frozen=True, kw_only=True, slots=True)
class MachinePlan:
    """The plan of a run on `workers` GPUs of a given kind or size, e.g. 8xH100 or 8x80GB; sizes in bytes.

    `fitting` blocks fit on a GPU; `wanted` blocks per shard give every worker enough visits. A worker takes
    `worker_bytes` of a GPU and `host_bytes` beside it, none where both have one memory. `lacking` says what is missing
    for one block at a time. The time by stage is known for cards of `CARDS`.
    """

    machine: str
    workers: int
    lacking: str | None
    blocks_per_shard: int
    fitting: int
    wanted: int
    worker_bytes: int
    host_bytes: int
    run_store_bytes: int
    stages: list[StageTime]

    @property
    def fits(self) -> bool:
        """Whether a run is possible."""
        return self.lacking is None


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformPlan:
    """The model in one format, and where a group cannot take it in its smallest: bits per parameter and times."""

    format: FormatName
    bpp: float
    times: PlanTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Properties of a run before it measures. Sizes in bytes.

    `facts` were learned of an architecture without a family, `guesses` are assumed. `groups` counts fused groups by the
    last part of their name, `groups_per_format` those that can take a format. `uniform` has the model in one
    format. `kept` has the reason for every
    unquantized module; `vram` is that of the largest plan in the budget.
    """

    architecture: str
    family: str
    facts: list[str]
    guesses: list[str]
    blocks: int
    quantizable_parameters: int
    source_bytes: int
    groups: dict[str, int]
    groups_per_format: dict[FormatName, int]
    uniform: list[UniformPlan]
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
    preflight: Preflight | None


def inspect(config: Config, *, machines: Sequence[str] = (), deep: bool = False) -> Inspection:
    """Layout, candidates, budget bounds, memory and disk plan.

    With `machines`, e.g. 8xH100 or 8x80GB, the plan is for those GPUs instead of this machine, and weights may be
    missing. With `deep` a few tokens go through one block of each structure, in this process, as at the start of a run.

    Raises:
        InputError: the configuration cannot be used, or its run cannot fit on this machine.
    """
    others = [Gpus.parse(machine) for machine in machines]
    if others:
        config = checks.with_dtype(config, gpu=True)
    run = Run(config, weights=False)
    layout, sizes = run.layout, run.roomiest
    limit = run.check_budget()
    plan = run.memory_plan
    workers = checks.expected_workers(config)
    if others:
        size = shard_size(plan, config, workers=workers, free=checks.free_here(config, workers))
    else:
        size = checks.check_room(config, plan)
    return Inspection(
        architecture=layout.architecture,
        family=layout.family,
        facts=list(layout.facts),
        guesses=[*layout.guesses, *_assumed(run.source), *_left_out(run.source)],
        blocks=len(layout.blocks),
        quantizable_parameters=layout.parameters,
        source_bytes=sum(info.nbytes for info in run.source.stored.values()),
        groups=dict(Counter(group.name.rpartition(".")[2] for group in layout.groups)),
        groups_per_format={name: int(sizes.allowed[:, column].sum()) for column, name in enumerate(sizes.formats)},
        uniform=[_uniform(run, name) for name in sizes.formats],
        kept=dict(layout.ignored),
        budget_bytes=limit,
        vram=None if sizes.serving is None else sizes.serving.memory(sizes.loaded(_stored(sizes, config, limit))),
        restricted_groups=restricted(sizes, layout),
        dtype=run.config.model.dtype,
        needs=plan,
        workers=workers,
        on_this_machine=not joins(config.cluster),
        blocks_per_shard=size,
        worker_bytes=plan.room(size.free).peak(size.blocks),
        run_store_bytes=plan.run_store(size.blocks),
        machines=[_plan(run, plan, other) for other in others],
        preflight=_preflight(run) if deep else None,
    )


def _uniform(run: Run, name: FormatName) -> UniformPlan:
    sizes, columns = run.sizes, uniform_columns(run.sizes, name)
    return UniformPlan(
        format=name,
        bpp=sizes.bpp(int(sizes.weights[range(len(columns)), columns].sum())),
        times=run.times.of_plan(columns, run.config.allocation.limits),
    )


def _preflight(run: Run) -> Preflight:
    """What the first worker of a run does before it measures."""
    if isinstance(run.source, ConfigOnlyCheckpoint):
        raise InputError(f"{run.source.store.uri} has no weights, which --deep would run")
    checks.check_output_config(run.source, run.layout, run.config.formats)
    cuda = run.config.cluster.device != "cpu" and torch.cuda.is_available()
    runner = ModelRunner(
        run.source,
        dtype=getattr(torch, run.config.model.dtype),
        device=torch.device("cuda" if cuda else "cpu"),
        scope=scope_of(run.config),
    )
    return preflight(runner, run.calibration, loss_of(run.config, runner))


def _stored(sizes: Sizes, config: Config, limit: int) -> int:
    """Upper bound on the bytes of candidates; `bpp` does not count scalars, so the most scalars are added."""
    return limit if config.budget.bpp is None else limit + int((sizes.stored - sizes.weights).max(axis=1).sum())


def _plan(run: Run, plan: MemoryPlan, machines: Gpus) -> MachinePlan:
    config, layout = run.config, run.layout
    # What is configured for this machine says nothing about another one.
    elsewhere = config.model_copy(update={"cluster": config.cluster.model_copy(update={"memory": "auto"})})
    size = shard_size(plan, elsewhere, workers=machines.workers, free=machines.free)
    blocks = max(1, size.blocks)
    rooms = [room for room, _ in plan.rooms(machines.free).values()]
    stages: list[StageTime] = []
    if machines.card is not None:
        rates = [machines.card.rates(len(codecs_of(config.formats)))] * machines.workers
        stages = estimate(layout, config, plan, rates, blocks_per_shard=blocks)
    return MachinePlan(
        machine=machines.text,
        workers=machines.workers,
        lacking=plan.lacking(machines.free),
        blocks_per_shard=blocks,
        fitting=max(0, size.fitting),
        wanted=size.wanted,
        worker_bytes=rooms[0].peak(blocks),
        host_bytes=sum(room.peak(blocks) for room in rooms[1:]),
        run_store_bytes=plan.run_store(blocks),
        stages=stages,
    )


def _left_out(source: TensorSource) -> Iterator[str]:
    """Folders that are not copied."""
    copied = {*source.other_files()}
    folders = sorted({key.partition("/")[0] for key in source.store.list() if "/" in key and key not in copied})
    if folders:
        yield f"files in {', '.join(f'{folder}/' for folder in folders)} are not copied"


def _assumed(source: TensorSource) -> Iterator[str]:
    """Assumptions made because there are no weights."""
    if isinstance(source, ConfigOnlyCheckpoint):
        yield "no weights are there: names and shapes are those of the configuration, in BF16"
        names = source.unexplained()
        if names:
            yield f"the index names {len(names)} tensors that the configuration does not explain, {names[0]} the first"
