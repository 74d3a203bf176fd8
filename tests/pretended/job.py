"""A whole job on the CPU and on the pretended device, whose guard must have been loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from actors import diagnosis
from actors.worker import ShardWorker
from jobs.pipeline.diagnosis import doctor
from jobs.pipeline.repository_evaluation import evaluate
from jobs.pipeline.run import Run
from jobs.pipeline.stages import quantize
from prismaquant_ray.config import Config
from prismaquant_ray.serialization import to_json
from tests import inprocess
from tests.architectures import WORKING, make_architecture
from tests.pretended.device import CUDA, pretended_cuda
from tests.runs import configuration, digests, full_configuration
from tests.tiny import ARCHITECTURES, make_checkpoint, make_text
from tests.tiny_families import VISION_FAMILIES, make_family

# All that the shapes of tiny models can take: a dense model and one with experts show what is different about each.
FORMATS = "formats=[INT3A16, INT4, MXFP4, NVFP4, NVFP4A16, INT6A16, FP8, INT8, INT8A16, MXFP8, BF16]"
IN_ALL_FORMATS = ("llama", "qwen3_moe")
# Those of a model whose architecture is the question.
FEW_FORMATS = "formats=[INT4, NVFP4, FP8, MXFP8, BF16]"


class DeviceWorker(ShardWorker):
    """A worker on the pretended device."""

    def __init__(self) -> None:
        super().__init__()
        self.device = CUDA


def whole_job(config: Config, text: Path) -> dict[str, Any]:
    """The repository of a configuration, measured while it is made and again as anybody's."""
    workers = inprocess.in_process()
    found = quantize(config, open_workers=workers)
    settings = ("calibration.microbatch=2", f"model.quantize_lm_head={str(config.model.quantize_lm_head).lower()}")
    again = evaluate(
        str(config.store.output),
        config.model.source,
        text,
        sequences=3,
        length=24,
        overrides=settings,
        open_workers=workers,
    )
    assert found.evaluation is not None
    return {
        "files": digests(Path(config.store.output)),
        "predicted_loss": found.repository.plan.predicted_loss,
        "prices": prices(config),
        "measured": [to_json(plan.activations) for plan in found.evaluation.plans],
        "evaluated": [to_json(again.weights), to_json(again.activations)],
    }


def prices(config: Config) -> list[float]:
    """What the backward pass found, of every group in every format: before what the driver makes of all together."""
    backward = Run(config).measured().backward
    groups = [group for index in sorted(backward) for group in backward[index].groups.values()]
    return [price.cost for group in groups for price in group.values()]


def both_jobs(name: str, directory: Path, dtype: str) -> dict[str, Any]:
    """The job of a tiny architecture or family: digests and measured losses of both, and what the device's cost."""
    if name in WORKING:
        source = make_architecture(directory / "source", WORKING[name])
    else:
        source = (make_checkpoint if name in ARCHITECTURES else make_family)(directory / "source", name)
    configured = full_configuration if name in VISION_FAMILIES else configuration
    text = make_text(directory / "evaluation", 4000, seed=9)
    formats = FORMATS if name in IN_ALL_FORMATS else FEW_FORMATS
    settings = (formats, f"model.dtype={dtype}", f"evaluation={{text: {text}, sequences: 3, length: 24}}")
    here, there = (configured(directory / place, source, *settings) for place in ("cpu", "cuda"))
    found: dict[str, Any] = {}
    with sdpa_kernel(SDPBackend.MATH):
        found["cpu"] = whole_job(here, text)
        with pretended_cuda() as ledger, patch.object(inprocess, "ShardWorker", DeviceWorker):
            found["cuda"] = whole_job(there, text)
    found["launches"] = dict(ledger.launches.most_common())
    found["waits"] = [[kind, place, count] for (kind, place), count in ledger.waits.most_common()]
    return found


def doctored(directory: Path) -> dict[str, Any]:
    """What the doctor says about the device, by the name of a check; its rates are of small things."""
    config = configuration(directory / "run", make_checkpoint(directory / "source", "llama"), FORMATS)
    small = {"_PRODUCT": {"cuda": 64}, "_ENCODED": {"cuda": (32, 128)}, "_COPIED": 1 << 12, "_STORED": 1 << 12}
    with pretended_cuda(), patch.object(inprocess, "ShardWorker", DeviceWorker), patch.multiple(diagnosis, **small):
        found = doctor(config, open_workers=inprocess.in_process())
    examined = found.workers[0]
    assert examined.diagnosis is not None
    return {
        "device": examined.diagnosis.machine.device,
        "failed": [check.found for _, check in found.failed],
        "checked": [check.name for check in examined.checks],
        "copies": examined.diagnosis.rates.to_host is not None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
