"""llm-compressor's `oneshot` with an exported recipe: the scheme that every Linear got, and what it saves.

    PYTHON tests/recipe_check/with_llm_compressor.py MODEL RECIPE.yaml TOKENS.json OUTPUT

TOKENS has lists of token ids of one length. OUTPUT gets the quantized model and `linears.json`: by name of a Linear its
`weights` and `input_activations` as compressed-tensors calls them, or null where it was left alone. Runs in a virtual
environment of its own, so it imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM


def scheme_of(module: torch.nn.Module) -> dict[str, Any] | None:
    """The scheme that was put on a module."""
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return None
    body = json.loads(scheme.model_dump_json())
    return {key: body[key] for key in ("weights", "input_activations")}


def main() -> None:
    """Quantize, look, save."""
    model_path, recipe, tokens_path, output = sys.argv[1:]
    torch.set_num_threads(1)
    tokens = json.loads(Path(tokens_path).read_text())
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    rows = {"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
    )
    found = {name: scheme_of(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with torch.no_grad():
        logits = model(torch.tensor(tokens[:1])).logits
    model.save_pretrained(output, save_compressed=True)
    report = {"linears": found, "finite": bool(torch.isfinite(logits).all())}
    (Path(output) / "linears.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
