"""Small whole runs: their configuration, through the same YAML as a user's, and what they write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobs.pipeline.assembly import AssembledRepository, assemble
from jobs.pipeline.run import Run
from prismaquant_ray.config import Config, load_config
from prismaquant_ray.records import PlanRecord
from tests.inprocess import in_process
from tests.tiny import make_text

IMAGES = Path(__file__).parents[1] / "configs/data/images"


def configuration(
    directory: Path,
    source: Path,
    *overrides: str,
    bpp: float = 6.0,
    characters: int = 6000,
    sequences: int = 8,
    images: int = 0,
    sweep: Sequence[float] = (),
    evaluation: bool = False,
) -> Config:
    """A run below `directory`, whose config.yaml is written there; with the first few of the shipped images."""
    directory.mkdir(parents=True, exist_ok=True)
    body: dict[str, Any] = {
        "model": {"source": str(source)},
        "calibration": {
            "text": str(make_text(directory, characters)),
            "sequences": sequences,
            "length": 32,
            "microbatch": 3,
            "holdout": 0.25,
        },
        # FP8 beside MXFP8 would only take time.
        "formats": ["NVFP4", "MXFP8", "BF16"],
        "budget": {"bpp": bpp},
        "cluster": {"address": "local", "workers": 1},
        "store": {"run": str(directory / "run"), "output": str(directory / "repository")},
    }
    if images:
        body["calibration"]["images"] = str(_captions(directory, images))
    if sweep:
        body["sweep"] = list(sweep)
    if evaluation:
        text = make_text(directory / "evaluation", 8000, seed=9)
        body["evaluation"] = {"text": str(text), "sequences": 4, "length": 24}
    path = directory / "config.yaml"
    path.write_text(json.dumps(body, indent=2))
    return load_config(path, overrides)


#: A run as the modules about families have it.
family_configuration = partial(configuration, bpp=6.25, characters=8000, sequences=6)


def full_configuration(directory: Path, source: Path, *overrides: str) -> Config:
    """A run that measures all that a model has: images, experts, draft, head."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = [{"image": str(IMAGES / name), "text": name} for name in ("maze.png", "clock.png", "handwriting.png")]
    (directory / "images.jsonl").write_text("\n".join(map(json.dumps, entries)))
    settings = ("model.quantize_lm_head=true", f"calibration.images={directory / 'images.jsonl'}")
    return configuration(directory, source, *settings, *overrides)


def _captions(directory: Path, images: int) -> Path:
    lines = (IMAGES / "captions.jsonl").read_text().splitlines()[:images]
    entries = [json.loads(line) for line in lines]
    captions = directory / "captions.jsonl"
    captions.write_text("\n".join(json.dumps({**e, "image": str(IMAGES / e["image"])}) for e in entries))
    return captions


def measured(config: Config, workers: int = 1) -> Run:
    """A run after measuring, in this process."""
    run = Run(config, open_workers=in_process(workers))
    run.measure()
    return run


def assembled(run: Run, plan: PlanRecord | None = None) -> AssembledRepository:
    """The repository of the run's plan, or of another; measures and repairs what that takes."""
    return run.repairing(lambda known: assemble(run, known, known.plan if plan is None else plan))


def quantized(config: Config, workers: int = 1) -> AssembledRepository:
    """The repository of a configuration, measured in this process."""
    return assembled(Run(config, open_workers=in_process(workers)))


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
