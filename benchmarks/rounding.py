"""GPTQ to NVFP4 against llm-compressor's, and scale search against a plain loop.

    python -m benchmarks.rounding [--peer PYTHON] [--threads 1 2]

GPTQ rounds one Linear, 4096 x 4096, for 8192 calibration rows in BF16, in a process of its own that does everything
twice; the second time counts. Ours and the peer's take turns, with one thread and then with two. Compared are
calibration (the Hessian), rounding (scales that fit a group's largest weight, factorization, columns), and both; scale
search is beside them, because the peer has none. `error` is the mean squared output error of the BF16 weights on rows
that neither saw. The peer is benchmarks/peers/llm_compressor_gptq.py, in an environment of its own.

The plain loop tries 32 candidates with the codec's public methods, a whole matrix at a time; both give the same codes.
Figures go to benchmarks/results/rounding.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.results import save
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Codec, Rounded, grouped
from prismaquant_ray.forward.gptq import Gptq, factorize, gptq
from prismaquant_ray.forward.scale_search import ScaleSearch, round_with, searched
from prismaquant_ray.forward.statistics import InputStatistics, InputSums, output_error

SIZE, ROWS, BATCHES, HELD_OUT = 4096, 8192, 8, 2048
REPEATS = 3
SEARCHES = 5
PEER = Path(__file__).parent / "peers" / "llm_compressor_gptq.py"
NVFP4 = FORMATS[FormatName.NVFP4].codec
Stages = dict[str, float]
T = TypeVar("T")


def make_case(path: Path) -> tuple[Tensor, Tensor]:
    """Weights and correlated inputs with louder and quieter channels, saved; and weight, Σ x xᵀ of held-out rows."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(SIZE) + torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    loudness = (0.5 * torch.randn(SIZE, generator=generator)).exp()
    x = (torch.randn(ROWS + HELD_OUT, SIZE, generator=generator) @ mix * loudness).bfloat16()
    weight = (0.02 * torch.randn(SIZE, SIZE, generator=generator)).bfloat16()
    torch.save({"weight": weight, "x": x[:ROWS].view(BATCHES, -1, SIZE)}, path)
    held_out = x[ROWS:].float()
    return weight.float(), held_out.T @ held_out


def timed(stages: Stages, name: str, run: Callable[[], T]) -> T:
    """Its result, with wall and CPU seconds noted."""
    wall, cpu = perf_counter(), process_time()
    result = run()
    stages[f"{name}_wall"], stages[f"{name}_cpu"] = perf_counter() - wall, process_time() - cpu
    return result


def ours(case: Path, output: Path, threads: int) -> Stages:
    """Seconds by stage, the second time; the weights of both kinds of scales go to `output`."""
    torch.set_num_threads(threads)
    loaded = torch.load(case)
    for _ in range(2):
        decoded, stages = quantized(loaded["weight"].float(), loaded["x"])
    torch.save(decoded, output)
    return {**stages, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def quantized(weight: Tensor, batches: Tensor) -> tuple[list[Tensor], Stages]:
    """BF16 weights by GPTQ under the scales of the largest weights and under searched ones; seconds by stage."""
    assert NVFP4 is not None
    scale = NVFP4.global_scale(float(weight.abs().max()))
    stages: Stages = {}
    found = timed(stages, "calibration", lambda: calibrated(batches))
    start = timed(stages, "scales", lambda: nearest_scales(weight, NVFP4, scale))
    factor = timed(stages, "factor", lambda: factorize(found.train, Gptq()))
    rounded = timed(stages, "columns", lambda: gptq(weight, start, NVFP4, factor))
    best = timed(stages, "search", lambda: searched(weight, NVFP4, scale, found.importance, ScaleSearch()))
    for clock in ("wall", "cpu"):
        stages[f"rounding_{clock}"] = sum(stages[f"{stage}_{clock}"] for stage in ("scales", "factor", "columns"))
    return [NVFP4.dequantized(each) for each in (rounded, gptq(weight, best, NVFP4, factor))], stages


def nearest_scales(weight: Tensor, codec: Codec, global_scale: Tensor | None) -> Rounded:
    """Where GPTQ starts when nothing is searched; it reads no values."""
    amax = grouped(weight, weight.shape[1] // codec.width(weight.shape[1])).abs().amax(-1)
    return Rounded(values=weight, scale=codec.nearest_scale(amax, global_scale), global_scale=global_scale)


def calibrated(batches: Tensor) -> InputStatistics:
    """Statistics of inputs none of which is held out."""
    sums = InputSums(SIZE, batches.device)
    for x in batches.split(1):
        sums.add(x.flatten(0, 1), x[:0].flatten(0, 1))
    return sums.statistics()


def run(command: list[str | Path], threads: int) -> Stages:
    """What the command's last line says."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    figures: Stages = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(peer: Path, threads: int, case: Path, held_out: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Medians of both, median ratios of turns, and held-out errors."""
    weights = {"ours": case.with_name("ours.pt"), "llm-compressor": case.with_name("peer.pt")}
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.rounding", "--case", case, "--output", weights["ours"]],
        "llm-compressor": [peer, PEER, case, weights["llm-compressor"]],
    }
    turns = [
        {name: run([*command, "--threads", str(threads)], threads) for name, command in commands.items()}
        for _ in range(REPEATS)
    ]
    medians = {
        name: {stage: round(statistics.median(turn[name][stage] for turn in turns), 3) for stage in turns[0][name]}
        for name in commands
    }

    def ratio(clock: str, theirs: tuple[str, ...], own: tuple[str, ...]) -> float:
        each = [
            sum(turn["llm-compressor"][f"{s}_{clock}"] for s in theirs) / sum(turn["ours"][f"{s}_{clock}"] for s in own)
            for turn in turns
        ]
        return round(statistics.median(each), 2)

    both = ("calibration", "rounding")
    ratios = {
        clock: {
            "calibration": ratio(clock, both[:1], both[:1]),
            "rounding": ratio(clock, both[1:], both[1:]),
            "both": ratio(clock, both, both),
            "both, ours with search": ratio(clock, both, (*both, "search")),
        }
        for clock in ("wall", "cpu")
    }
    found = [*torch.load(weights["ours"]), torch.load(weights["llm-compressor"])["weight"]]
    names = ("ours, scales of the largest weight", "ours, searched scales", "llm-compressor")
    errors = {name: _mean_error(each, *held_out) for name, each in zip(names, found, strict=True)}
    return {"threads": threads, "seconds": medians, "ratios": ratios, "error": errors, "turns": turns}


def _mean_error(decoded: Tensor, weight: Tensor, hessian: Tensor) -> float:
    return float(output_error(decoded.float() - weight, hessian).double().sum()) / (HELD_OUT * len(weight))


def plain(weight: Tensor, codec: Codec, scale: Tensor | None, importance: Tensor, settings: ScaleSearch) -> Rounded:
    """`searched` as it reads: every candidate for the whole matrix, the better one kept."""
    groups = weight.shape[1] // codec.width(weight.shape[1])
    whole, importance = grouped(weight, groups), grouped(importance, groups)
    error, best = torch.full(whole.shape[:-1], torch.inf), None
    for stored in codec.scale_candidates(whole.abs().amax(-1), scale, settings.multipliers(codec).float()):
        factor = codec.scale_value(stored, scale).unsqueeze(-1)
        found = ((codec.round(whole / factor) * factor - whole).square() * importance).sum(-1)
        best = stored if best is None else torch.where(found < error, stored, best)
        error = torch.minimum(found, error)
    assert best is not None
    return round_with(weight, best, codec, scale)


def search(weight: Tensor) -> dict[str, Any]:
    """Median seconds of both searches in turn, one thread, and their ratio."""
    torch.set_num_threads(1)
    assert NVFP4 is not None
    importance = torch.rand(SIZE, generator=torch.Generator().manual_seed(1)) + 0.1
    arguments = (weight, NVFP4, NVFP4.global_scale(float(weight.abs().max())), importance, ScaleSearch())
    turns: list[Stages] = []
    for _ in range(SEARCHES):
        stages: Stages = {}
        loop = timed(stages, "plain", lambda: plain(*arguments))
        fast = timed(stages, "searched", lambda: searched(*arguments))
        turns.append(stages)
        for name in ("values", "scale"):
            if not torch.equal(getattr(loop, name).float(), getattr(fast, name).float()):
                sys.exit(f"the plain loop has other {name}")
    figures: dict[str, Any] = {s: round(statistics.median(turn[s] for turn in turns), 3) for s in turns[0]}
    for clock in ("wall", "cpu"):
        each = [turn[f"plain_{clock}"] / turn[f"searched_{clock}"] for turn in turns]
        figures[f"ratio_{clock}"] = round(statistics.median(each), 2)
    return figures


def show(figures: dict[str, Any]) -> None:
    """A table for one number of threads."""
    print(f"\n{figures['threads']} thread(s): seconds wall / CPU, medians of {REPEATS}; peak memory of the process")
    stages = ("calibration", "rounding", "factor", "columns", "search")
    print(f"{'':16}" + "".join(f"{stage:>14}" for stage in stages) + f"{'MB':>8}")
    for name, seconds in figures["seconds"].items():
        cells = (
            f"{seconds[f'{stage}_wall']:.2f} / {seconds[f'{stage}_cpu']:.2f}" if f"{stage}_cpu" in seconds else ""
            for stage in stages
        )
        print(f"{name:16}" + "".join(f"{cell:>14}" for cell in cells) + f"{seconds['peak_mb']:8.0f}")
    for clock, ratios in figures["ratios"].items():
        print(f"times as fast, {clock}: " + ", ".join(f"{stage} {value}" for stage, value in ratios.items()))
    print("held-out error: " + ", ".join(f"{name} {error:.5f}" for name, error in figures["error"].items()))


def main() -> None:
    """Measure, print and store; with --case, what one process of ours does."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--peer", type=Path, default=Path(".venv-peers/llm-compressor/bin/python"))
    for name in ("--case", "--output"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(ours(arguments.case, arguments.output, *arguments.threads)))
        return
    if not arguments.peer.exists():
        sys.exit(f"no Python of llm-compressor at {arguments.peer}; name one with --peer")
    torch.set_num_threads(max(arguments.threads))
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.pt"
        held_out = make_case(case)
        found = []
        for threads in arguments.threads:
            found.append(compare(arguments.peer, threads, case, held_out))
            show(found[-1])
    searches = search(held_out[0])
    print(f"\nscale search, CPU seconds: plain loop {searches['plain_cpu']}, searched {searches['searched_cpu']}")
    print(f"times as fast: {searches['ratio_wall']} wall, {searches['ratio_cpu']} CPU")
    linear = {"size": [SIZE, SIZE], "rows": ROWS, "held_out_rows": HELD_OUT, "format": str(FormatName.NVFP4)}
    save("rounding", {"linear": linear, "gptq": found, "search": searches})


if __name__ == "__main__":
    main()
