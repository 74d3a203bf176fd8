"""NVIDIA ModelOpt's auto_quantize with its default (gradient) score, then its export of a checkpoint.

    PYTHON benchmarks/peers/model_optimizer.py MODEL TOKENS.npy OUTPUT --bits 5.5 [--formats NVFP4,MXFP8]

Runs in a virtual environment of its own, so it imports nothing of the project.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

FORMATS = {"NVFP4": mtq.NVFP4_DEFAULT_CFG, "MXFP8": mtq.MXFP8_DEFAULT_CFG, "FP8": mtq.FP8_DEFAULT_CFG}


def main() -> None:
    """Choose, quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=float, default=5.5)
    parser.add_argument("--formats", default="NVFP4,MXFP8")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = [{"input_ids": row[None], "labels": row[None]} for row in torch.from_numpy(np.load(arguments.tokens))]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")

    def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return model(**batch)

    def loss(output: Any, _: dict[str, torch.Tensor]) -> torch.Tensor:
        return output.loss

    model, _ = mtq.auto_quantize(
        model,
        # The output head stays as it is, and does not count, as everywhere in this comparison.
        constraints={"effective_bits": arguments.bits, "cost": {"excluded_module_name_patterns": ["*lm_head*"]}},
        quantization_formats=[FORMATS[name] for name in arguments.formats.split(",")],
        data_loader=batches,
        forward_step=forward,
        loss_func=loss,
        disabled_layers=["*lm_head*"],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
