"""llm-compressor's GPTQ of one Linear to NVFP4, through the modifier's own steps, with its defaults.

    PYTHON benchmarks/peers/llm_compressor_gptq.py CASE.pt OUTPUT.pt --threads N

CASE holds `weight` (O, I) and `x` (batches, tokens, I) in BF16. OUTPUT gets `weight`, as quantized; printed are the
wall and CPU seconds of calibration (the Hessian) and of rounding (scales, factorization, columns), and the process's
peak memory. Everything is done twice, and the second time counts. By default the modifier visits the most active
columns first under scales of the original groups (static ordering), in blocks of 128, with damping 0.01 and scales that
fit each group's largest weight. The range of activations is not observed, which saves it a little.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers.gptq import GPTQModifier


def quantized(weight: torch.Tensor, batches: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """The weight on the grid, and seconds by stage."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    linear.weight.data.copy_(weight)
    state, event = State(model=torch.nn.Sequential(linear)), Event()
    modifier = GPTQModifier(targets="Linear", scheme="NVFP4")
    modifier.on_initialize(state)
    if (ordering := linear.quantization_scheme.weights.actorder) != "static":
        raise SystemExit(f"the modifier orders columns by {ordering}, not static")
    begun = time.perf_counter(), time.process_time()
    modifier.on_calibration_start(state, event)
    with torch.no_grad():
        for x in batches:
            # The product itself is no part of it.
            modifier.calibrate_module(linear, (x,), x)
    calibrated = time.perf_counter(), time.process_time()
    modifier.on_sequential_epoch_end(state, event, [linear])
    modifier.on_calibration_end(state, event)
    rounded = time.perf_counter(), time.process_time()
    wall, cpu = zip(begun, calibrated, rounded, strict=True)
    return linear.weight.data, {
        "calibration_wall": wall[1] - wall[0],
        "calibration_cpu": cpu[1] - cpu[0],
        "rounding_wall": wall[2] - wall[1],
        "rounding_cpu": cpu[2] - cpu[1],
    }


def main() -> None:
    """Calibrate and round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = torch.load(arguments.case)
    for _ in range(2):
        weight, figures = quantized(case["weight"], case["x"])
    torch.save({"weight": weight}, arguments.output)
    print(json.dumps({**figures, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
