"""ModelOpt's `mtq.quantize` with an exported configuration: the quantizers that every Linear got.

    PYTHON tests/recipe_check/with_modelopt.py MODEL modelopt.yaml TOKENS.json OUTPUT [--still]

ModelOpt rounds to NVFP4, MXFP4 and MXFP8 on CUDA devices only: with `--still` the quantizers are made, but nothing is
calibrated or run. TOKENS has lists of token ids of one length. OUTPUT gets `linears.json`: by name of a Linear the
attributes of its enabled `weight`, `input` and `output` quantizers, null where one is disabled; `elsewhere` are enabled
quantizers that belong to no Linear. Runs in a virtual environment of its own, so it imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import yaml
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from transformers import AutoModelForCausalLM


def attributes_of(quantizer: Any) -> dict[str, Any] | None:
    """What a quantizer does, as its configuration says it; None if it is disabled."""
    if not quantizer.is_enabled:
        return None
    blocks = quantizer.block_sizes
    return {
        "num_bits": quantizer.num_bits,
        "axis": quantizer.axis,
        "block_sizes": None if blocks is None else {str(key): value for key, value in blocks.items()},
        "dynamic": bool(quantizer._dynamic),
    }


def main() -> None:
    """Quantize and look."""
    model_path, config_path, tokens_path, output = sys.argv[1:5]
    still = "--still" in sys.argv
    torch.set_num_threads(1)
    tokens = torch.tensor(json.loads(Path(tokens_path).read_text()))
    config = yaml.safe_load(Path(config_path).read_text())
    QuantizeConfig.model_validate(config)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        before = model(tokens[:1]).logits
        model = mtq.quantize(model, {**config, "algorithm": None} if still else config, lambda each: each(tokens))
        after = before if still else model(tokens[:1]).logits
    modules = dict(model.named_modules())
    found = {
        name: {kind: attributes_of(modules[f"{name}.{kind}_quantizer"]) for kind in ("weight", "input", "output")}
        for name in linears
    }
    own = {f"{name}.{kind}_quantizer" for name in linears for kind in ("weight", "input", "output")}
    elsewhere = [
        name for name, module in modules.items()
        if isinstance(module, TensorQuantizer) and module.is_enabled and name not in own
    ]  # fmt: skip
    report = {
        "linears": found,
        "elsewhere": elsewhere,
        "finite": bool(torch.isfinite(after).all()),
        "changed": not torch.equal(before, after),
    }
    Path(output).mkdir(parents=True, exist_ok=True)
    (Path(output) / "linears.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
