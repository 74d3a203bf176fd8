"""The demo's configuration and model, and the product's command, as benchmarks start it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

CONFIG = Path("configs/demo.yaml")
MODEL = Path("runs/demo/SmolLM2-135M-Instruct")
CALIBRATION_TEXT = Path("configs/data/calibration.txt")
EVALUATION_TEXT = Path("configs/data/evaluation.txt")
COMMAND = Path(sys.executable).with_name("prismaquant-ray")


def command(name: str, config: Path = CONFIG, settings: Sequence[str] = (), *more: str) -> list[str]:
    """One of the product's commands on a configuration, with `key=value` settings over it."""
    return [str(COMMAND), name, str(config), *(word for each in settings for word in ("--set", each)), *more]


def need(model: Path = MODEL) -> None:
    """SystemExit(2) with one line when a model, which a benchmark measures with, is not there yet."""
    if not (model / "config.json").is_file():
        print(f"error: {model} is not there; `make demo` writes the demo's", file=sys.stderr)
        raise SystemExit(2)
