"""Repositories of other makers, evaluated on the CPU and on the pretended device, whose guard must have been loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.pipeline.repository_evaluation import evaluate
from prismaquant_ray.serialization import to_json
from tests import inprocess
from tests.foreign_repositories import SCHEMES, make_compressed, make_quantizable
from tests.pretended.device import pretended_cuda
from tests.pretended.job import DeviceWorker
from tests.tiny import make_text


def evaluations(names: Sequence[str], directory: Path) -> dict[str, list[Any]]:
    """By scheme: what the CPU and what the device measured, of weights alone and with activations."""
    source, text = make_quantizable(directory / "source"), make_text(directory / "text", 4000)

    def measured(repository: Path) -> list[dict[str, Any]]:
        workers = inprocess.in_process()
        found = evaluate(str(repository), str(source), text, sequences=2, length=24, open_workers=workers)
        return [to_json(found.weights), to_json(found.activations)]

    found: dict[str, list[Any]] = {}
    for index, name in enumerate(names):
        repository = make_compressed(source, directory / f"repository-{index}", SCHEMES[name][0])
        with sdpa_kernel(SDPBackend.MATH):
            found[name] = [measured(repository)]
            with pretended_cuda(), patch.object(inprocess, "ShardWorker", DeviceWorker):
                found[name].append(measured(repository))
    return found
