"""llm-compressor's GPTQ of one Linear to NVFP4, through the modifier's own steps, with its defaults.

    PYTHON benchmarks/peers/llm_compressor_gptq.py CASE.pt OUTPUT.pt --threads N

CASE holds `weight` (O, I) and `x` (batches, tokens, I) in BF16. OUTPUT gets `weight`, as quantized, and the wall and CPU
seconds of calibration (Hessian and activation range) and of rounding.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers.gptq import GPTQModifier


def main() -> None:
    """Calibrate and round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = torch.load(arguments.case)
    linear = torch.nn.Linear(case["weight"].shape[1], case["weight"].shape[0], bias=False, dtype=torch.bfloat16)
    linear.weight.data.copy_(case["weight"])
    model = torch.nn.Sequential(linear)
    state, event = State(model=model), Event()
    modifier = GPTQModifier(targets="Linear", scheme="NVFP4")
    modifier.on_initialize(state)
    begun = time.perf_counter(), time.process_time()
    modifier.on_calibration_start(state, event)
    with torch.no_grad():
        for x in case["x"]:
            # The product itself is no part of it.
            modifier.calibrate_module(linear, (x,), x)
    calibrated = time.perf_counter(), time.process_time()
    modifier.on_sequential_epoch_end(state, event, [linear])
    modifier.on_calibration_end(state, event)
    rounded = time.perf_counter(), time.process_time()
    torch.save({"weight": linear.weight.data}, arguments.output)
    wall, cpu = zip(begun, calibrated, rounded, strict=True)
    figures = {
        "calibration_wall": wall[1] - wall[0],
        "calibration_cpu": cpu[1] - cpu[0],
        "rounding_wall": wall[2] - wall[1],
        "rounding_cpu": cpu[2] - cpu[1],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
