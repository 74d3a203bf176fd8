"""llm-compressor's GPTQ to NVFP4, or its plain rounding to a scheme, with its defaults.

    PYTHON benchmarks/peers/llm_compressor.py MODEL TOKENS.npy OUTPUT --modifier gptq|rtn --scheme NVFP4

Runs in a virtual environment of its own, so it imports nothing of the project.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"gptq": GPTQModifier, "rtn": QuantizationModifier}


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--modifier", choices=sorted(MODIFIERS), default="gptq")
    parser.add_argument("--scheme", default="NVFP4")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = np.load(arguments.tokens)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    rows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=MODIFIERS[arguments.modifier](targets="Linear", scheme=arguments.scheme, ignore=["lm_head"]),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
    )
    model.save_pretrained(arguments.output, save_compressed=True)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
