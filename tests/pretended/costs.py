"""What a worker's calls cost on the pretended device, whose guard must have been loaded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from actors.schedule.units import Shard
from prismaquant_ray.backward.pricing import Pricing
from prismaquant_ray.formats import FORMATS, codecs_of
from prismaquant_ray.forward.gptq import Gptq, factorize, gptq
from prismaquant_ray.forward.scale_search import ScaleSearch, searched
from tests import inprocess
from tests.pretended.device import CUDA, LEDGER, pretended_cuda
from tests.pretended.job import DeviceWorker
from tests.runs import configuration, full_configuration, measured
from tests.tiny import ARCHITECTURES, make_checkpoint
from tests.tiny_families import VISION_FAMILIES, make_family

Result = TypeVar("Result")
#: By pass, kind of unit and call: the most launches of one call and the most waits, with their places.
Costs = dict[str, dict[str, Any]]


def costs_of(name: str, directory: Path, *settings: str) -> Costs:
    """Of every call of a measurement, but for the first microbatch of a shard, which loads it; an exit has no other."""
    make = make_checkpoint if name in ARCHITECTURES else make_family
    configured = full_configuration if name in VISION_FAMILIES else configuration
    config = configured(directory / "run", make(directory / "source", name), "calibration.microbatch=2", *settings)
    found: Costs = {}

    class Counted(DeviceWorker):
        """Its calls, one by one."""

        def run(self, shard: Shard, microbatch: int, arriving: Any) -> Any:
            loaded = self.task is not None and self.task.shard == shard
            LEDGER.clear()
            answer = super().run(shard, microbatch, arriving)
            if loaded or _kind(shard) == "exit":
                _note(found, f"{shard.stage} {_kind(shard)} microbatch")
            return answer

        def finish(self, shard: Shard, following: Shard | None = None) -> Any:
            LEDGER.clear()
            answer = super().finish(shard, following)
            _note(found, f"{shard.stage} {_kind(shard)} finish")
            return answer

    def counted_add(pricing: Pricing, captured: Any, passed: Any, holdout: Any) -> Any:
        """As it is; before, the experts alone, counted by themselves."""
        before = dict(LEDGER.launches), dict(LEDGER.waits)
        experts = _of_experts(pricing)
        LEDGER.clear()
        add(experts, captured, passed, holdout)
        _note(found, "experts priced microbatch")
        LEDGER.clear()
        LEDGER.launches.update(before[0])
        LEDGER.waits.update(before[1])
        return add(pricing, captured, passed, holdout)

    add = Pricing.add
    workers = patch.object(inprocess, "ShardWorker", Counted), patch.object(Pricing, "add", counted_add)
    with sdpa_kernel(SDPBackend.MATH), pretended_cuda(), workers[0], workers[1]:
        measured(config)
    return found


def _of_experts(pricing: Pricing) -> Pricing:
    """The pricing of a block's experts; what it adds up is lost."""
    found = copy.copy(pricing)
    experts = tuple(group for group in pricing.block.groups if group.experts is not None)
    found.block = replace(pricing.block, groups=experts)
    found.traces = {name: trace.clone() for name, trace in pricing.traces.items()}
    found._squares, found._holdout = [], []
    return found


def _kind(shard: Shard) -> str:
    first = shard.units[0]
    return "block" if isinstance(first, int) else "exit" if not isinstance(first, str) else first


def _note(found: Costs, call: str) -> None:
    waits, launches = sum(LEDGER.waits.values()), sum(LEDGER.launches.values())
    entry = found.setdefault(call, {"launches": -1, "waits": -1})
    if launches > entry["launches"]:
        entry["launches"] = launches
        entry["launched"] = [f"{count}: {place}" for place, count in LEDGER.launches.most_common()]
    if waits > entry["waits"]:
        entry["waits"] = waits
        entry["waited"] = [f"{count} {kind}: {place}" for (kind, place), count in LEDGER.waits.most_common()]


def rounding_costs(columns: int) -> dict[str, tuple[int, int]]:
    """Launches and waits of rounding a matrix of few rows by each codec, and of a Hessian's factorization."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, columns, generator=generator)
    inputs = torch.randn(columns, 64, generator=generator)
    with torch.no_grad(), pretended_cuda():
        weight, hessian = rows.to(CUDA), (inputs @ inputs.T).to(CUDA)

        def counted(action: Callable[[], Result]) -> tuple[Result, tuple[int, int]]:
            action()  # makes constants
            LEDGER.clear()
            return action(), (sum(LEDGER.launches.values()), sum(LEDGER.waits.values()))

        factor, found["factor"] = counted(lambda: factorize(hessian, Gptq()))
        for name, codec in codecs_of(FORMATS).items():
            divisor = codec.global_scale(weight.abs().amax().view(1))
            arguments = (weight, codec, divisor, hessian.diagonal(), ScaleSearch())
            start, found[f"{name} search"] = counted(functools.partial(searched, *arguments))
            _, found[f"{name} gptq"] = counted(functools.partial(gptq, weight, start, codec, factor))
    return found
