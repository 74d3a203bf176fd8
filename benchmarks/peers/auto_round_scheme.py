"""AutoRound's AutoScheme: a mix of NVFP4 and MXFP8 for a budget, rounded without tuning (`iters=0`).

    PYTHON benchmarks/peers/auto_round_scheme.py MODEL TOKENS.npy OUTPUT --bits 5.5 [--format llm_compressor]

Runs in a virtual environment of its own, so it imports nothing of the project.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from auto_round.calib_dataset import register_dataset
from datasets import Dataset

# vLLM loads q, k, v as one matrix, and gate, up: each set has to have one format.
FUSED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def main() -> None:
    """Choose, quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=float, default=5.5)
    parser.add_argument("--schemes", default="NVFP4,MXFP8")
    parser.add_argument("--format", default="llm_compressor")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = np.load(arguments.tokens)
    rows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}

    # AutoScheme takes the name of a data set, nothing else.
    @register_dataset("tokens")
    def registered(*_: Any, **__: Any) -> Dataset:
        return Dataset.from_dict(rows)

    AutoRound(
        model=str(arguments.model),
        schemes=arguments.schemes,
        bits=arguments.bits,
        shared_layers=FUSED,
        dataset="tokens",
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        iters=0,
        device_map="cpu",
    ).quantize_and_save(str(arguments.output), format=arguments.format)


if __name__ == "__main__":
    main()
