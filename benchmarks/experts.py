"""Rounding a layer of experts at once against one expert at a time: `python -m benchmarks.experts`.

The layer has 64 experts, of hidden size 256 and intermediate size 128, and 4096 tokens that go to four experts each,
some experts seldom. Both ways call the same functions: statistics from routed rows, the factor of the Hessian, and
`encode_group` for gate/up and for down, all experts or one. The runs take turns, so that other load on the machine
falls on both; shown are medians, and where the time of each goes. The results of both are compared. Figures go to
benchmarks/results/experts.json.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results import save
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Codec
from prismaquant_ray.forward.encode import EncodedLinear, Rounding, encode_group
from prismaquant_ray.forward.statistics import InputStatistics, InputSums, Prior

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP = 64, 256, 128, 4096, 4
FORMATS_TRIED = (FormatName.NVFP4, FormatName.INT4, FormatName.FP8)
REPEATS = 5


class Routed(NamedTuple):
    """One input of the experts and the matrices that read it."""

    x: Tensor
    counts: Tensor
    held_out: Tensor
    weights: list[Tensor]


def layer() -> list[Routed]:
    """Rows (R, I) sorted by expert for gate/up and for down, with weights (E, O, I)."""
    generator = torch.Generator().manual_seed(0)
    popularity = 0.5 * torch.randn(EXPERTS, generator=generator)
    scores = torch.randn(TOKENS, EXPERTS, generator=generator) + popularity
    expert, rows = scores.topk(TOP).indices.flatten().sort(stable=True)
    held_out = (torch.arange(TOKENS) % 8 == 0)[rows // TOP]
    counts = torch.bincount(expert, minlength=EXPERTS)
    found = []
    for columns, members in ((HIDDEN, (INTERMEDIATE, INTERMEDIATE)), (INTERMEDIATE, (HIDDEN,))):
        mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
        x = torch.randn(len(rows), columns, generator=generator) @ mix
        weights = [torch.randn(EXPERTS, size, columns, generator=generator) * 0.02 for size in members]
        found.append(Routed(x.bfloat16(), counts, held_out, [weight.bfloat16() for weight in weights]))
    return found


def encoded(routed: Routed, prior: Prior, codec: Codec, spent: dict[str, float]) -> list[EncodedLinear]:
    """Everything from rows to codes, with seconds added by stage."""
    rounding = Rounding()
    times = [perf_counter()]
    found = InputStatistics.routed(routed.x, routed.counts, routed.held_out, prior)
    times.append(perf_counter())
    factor = rounding.factor(found)
    times.append(perf_counter())
    result = encode_group(routed.weights, codec, found, factor, rounding)
    times.append(perf_counter())
    for stage, (start, stop) in zip(("statistics", "factor", "encode"), pairwise(times), strict=True):
        spent[stage] += stop - start
    return result


def batched(inputs: list[Routed], codec: Codec, spent: dict[str, float]) -> list[EncodedLinear]:
    """All experts in one call."""
    return [linear for routed in inputs for linear in encoded(routed, prior_of(routed, spent), codec, spent)]


def single(inputs: list[Routed], codec: Codec, spent: dict[str, float]) -> list[list[EncodedLinear]]:
    """One expert a call, under the prior of the layer; by Linear and expert."""
    linears = []
    for routed in inputs:
        prior = prior_of(routed, spent)
        results = []
        for expert, (start, stop) in enumerate(pairwise([0, *routed.counts.cumsum(0).tolist()])):
            alone = Routed(
                routed.x[start:stop],
                routed.counts[expert : expert + 1],
                routed.held_out[start:stop],
                [weight[expert : expert + 1] for weight in routed.weights],
            )
            results.append(encoded(alone, prior, codec, spent))
        linears += [list(member) for member in zip(*results, strict=True)]
    return linears


def prior_of(routed: Routed, spent: dict[str, float]) -> Prior:
    """Of the whole layer; both ways take it once, and the same way, so that they have the same one."""
    start = perf_counter()
    pooled = InputSums(routed.x.shape[1], routed.x.device)
    pooled.add(routed.x[~routed.held_out], routed.x[routed.held_out])
    prior = Prior.of(pooled.statistics())
    spent["prior"] += perf_counter() - start
    return prior


def same(together: list[EncodedLinear], alone: list[list[EncodedLinear]]) -> float:
    """Share of experts' matrices whose codes, scales and method are the same bit for bit."""
    equal = [
        torch.equal(stack.rounded.values[e].view(torch.uint8), one.rounded.values[0].view(torch.uint8))
        and torch.equal(stack.rounded.scale[e].view(torch.uint8), one.rounded.scale[0].view(torch.uint8))
        and [stack.figures.method[e]] == one.figures.method
        for stack, ones in zip(together, alone, strict=True)
        for e, one in enumerate(ones)
    ]
    return sum(equal) / len(equal)


def measure(name: FormatName, inputs: list[Routed]) -> dict[str, Any]:
    """Median milliseconds of both ways and by stage, their ratio, and how many results are the same."""
    codec = FORMATS[name].codec
    assert codec is not None
    agreement = same(batched(inputs, codec, defaultdict(float)), single(inputs, codec, defaultdict(float)))
    runs: dict[str, list[dict[str, float]]] = {"single": [], "batched": []}
    for _ in range(REPEATS):
        for way, run in (("single", single), ("batched", batched)):
            spent: dict[str, float] = defaultdict(float)
            run(inputs, codec, spent)
            spent["all"] = sum(spent.values())
            runs[way].append(spent)
    ratios = sorted(one["all"] / all_["all"] for one, all_ in zip(runs["single"], runs["batched"], strict=True))
    return {
        "milliseconds": {
            way: {stage: round(1e3 * statistics.median(run[stage] for run in found), 1) for stage in found[0]}
            for way, found in runs.items()
        },
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "same": agreement,
    }


def main() -> None:
    """Print a line a format and write the results."""
    inputs = layer()
    counts = inputs[0].counts
    results: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "layer": {"experts": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "rows": int(counts.sum())},
        "tokens_of_an_expert": {"least": int(counts.min()), "median": int(counts.median()), "most": int(counts.max())},
        "formats": {},
    }
    print(f"{EXPERTS} experts, {int(counts.min())} to {int(counts.max())} tokens; medians of {REPEATS}, milliseconds")
    print(f"{'':8}{'ratio':>6} same    {'':8}{'all':>8}{'prior':>8}{'statistics':>12}{'factor':>8}{'encode':>8}")
    for name in FORMATS_TRIED:
        row = measure(name, inputs)
        results["formats"][str(name)] = row
        for way, spent in row["milliseconds"].items():
            head = f"{name:8}{row['ratio']:6.2f} {row['same']:.0%}" if way == "single" else ""
            print(f"{head:23}{way:9}{spent['all']:8.1f}{spent['prior']:8.1f}", end="")
            print(f"{spent['statistics']:12.1f}{spent['factor']:8.1f}{spent['encode']:8.1f}")
    save("experts", results)


if __name__ == "__main__":
    main()
