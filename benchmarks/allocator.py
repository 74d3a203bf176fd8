"""Time, memory and gap of the allocator: `python -m benchmarks.allocator`.

Each row is measured in a process of its own: preparation with the whole frontier, then eight budgets spread over it,
to the optimum and to a relative gap of 1e-6.
Instances, all seeded: `layers` has identical layers of five shapes, costs that fall fourfold a bit with measurement
noise, and formats some groups cannot take; `odd` is the same with sizes that share no factor; `tight` has costs
proportional to odd sizes, where nothing can be ruled out and the search ends at its limit.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from benchmarks.results import save
from prismaquant_ray.allocation.frontier import frontier
from prismaquant_ray.allocation.problem import AllocationProblem
from prismaquant_ray.allocation.solver import Solver

SHAPES = ((120, 3), (1_000, 8), (30_000, 6))
KINDS = ("layers", "odd", "tight")
BUDGETS = 8
NEAR = 1e-6
REPEATS = 5


def instance(kind: str, groups: int, formats: int) -> AllocationProblem:
    """One seeded problem."""
    random = np.random.default_rng(0)
    bits = np.sort(random.permutation([4.25, 4.5, 5.25, 6.25, 8.25, 8.5, 9.0, 16.0])[:formats])
    if kind == "layers":
        shapes = np.array([5120 * 7168, 5120 * 6144, 5120 * 34816, 17408 * 5120, 5120 * 96])
        parameters = shapes[np.arange(groups) % len(shapes), None]
    else:
        parameters = random.integers(10**6, 10**8, (groups, 1))
    size = (parameters * bits / 8).astype(np.int64)
    if kind == "tight":
        cost = 1 - 1e-10 * size
    else:
        sensitivity = 1e-4 * random.lognormal(0, 1.5, (groups, 1)) * parameters / parameters.mean()
        cost = sensitivity * 4.0**-bits * random.lognormal(0, 0.3, (groups, formats))
        cost[:, 1:][random.random((groups, formats - 1)) < 0.05] = np.nan
    return AllocationProblem(
        groups=tuple(f"group.{i}" for i in range(groups)), formats=tuple(map(str, bits)), cost=cost, size=size
    )


def measure(kind: str, groups: int, formats: int) -> dict[str, float]:
    """Median seconds, worst gaps, CPU seconds of everything, and this process's peak memory in MB."""
    problem = instance(kind, groups, formats)
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu = time.process_time()
    seconds: dict[str, list[float]] = {"frontier": [], "near": [], "optimum": []}
    gaps = {}
    for _ in range(1 if kind == "tight" else REPEATS):
        start = time.perf_counter()
        curve = frontier(problem)
        seconds["frontier"].append(time.perf_counter() - start)
        span = int(curve.bytes[-1] - curve.bytes[0])
        for name, tolerance in (("near", NEAR), ("optimum", 0.0)):
            start = time.perf_counter()
            solver = Solver(problem, gap_tolerance=tolerance)
            plans = [solver.plan(int(curve.bytes[0]) + span * (i + 1) // (BUDGETS + 1)) for i in range(BUDGETS)]
            seconds[name].append(time.perf_counter() - start)
            gaps[f"{name}_gap"] = max(plan.gap for plan in plans)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **{name: statistics.median(found) for name, found in seconds.items()},
        **gaps,
        "cpu": time.process_time() - cpu,
        "peak": peak / 1024,
        "added": (peak - baseline) / 1024,
    }


def main() -> None:
    """Print the table, or measure the one row named by the arguments."""
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
        return
    print(f"median of {REPEATS} (tight: 1); {BUDGETS} budgets; numpy {np.__version__}")
    print(
        f"instance    groups × formats    frontier    + to {NEAR:.0e}    + optimum    worst gap   peak RSS   of solver"
    )
    rows = []
    for kind in KINDS:
        for groups, formats in SHAPES:
            command = [sys.executable, "-m", "benchmarks.allocator", kind, str(groups), str(formats)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{kind:<10}{groups:>9,} × {formats:<8}{row['frontier'] * 1e3:>7.1f} ms{row['near'] * 1e3:>10.1f} ms"
                f"{row['optimum'] * 1e3:>10.1f} ms{row['optimum_gap']:>13.1e}{row['peak']:>8.0f} MB"
                f"{row['added']:>12.0f} MB"
            )
            rows.append({"instance": kind, "groups": groups, "formats": formats, **row})
    save("allocator", {"budgets": BUDGETS, "repeats": REPEATS, "rows": rows})


if __name__ == "__main__":
    main()
