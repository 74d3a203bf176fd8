"""A model larger than the memory of all its workers together; workers that must not take more than they were given."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.commands import assemble
from jobs.pipeline.run import Run
from prismaquant_ray.config import load_config
from prismaquant_ray.errors import ResourceError
from prismaquant_ray.event_log import steps_by_shard
from prismaquant_ray.events import read_events
from prismaquant_ray.source.files import INDEX
from prismaquant_ray.storage.store import Store
from tests.runs import configuration
from tests.tiny import make_checkpoint
from tests.waiting import PATIENCE

pytestmark = pytest.mark.ray
WORKERS, MEMORY = 2, 900_000_000
_SHAPE = {"hidden": 896, "intermediate": 896, "heads": 14, "kv_heads": 14, "head_dim": 64}
_LAYER = re.compile(r"model\.layers\.0\.(.+)")


def repeated(directory: Path, layers: int, per_file: int = 30) -> int:
    """A checkpoint whose layers are copies of one, written file by file; bytes of its weights."""
    make_checkpoint(directory, "llama", layers=1, **_SHAPE)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    layer = {found[1]: tensors.pop(found[0]) for name in list(tensors) if (found := _LAYER.fullmatch(name))}
    weight_map: dict[str, str] = {}
    size = 0

    def write(file: str, part: dict[str, Tensor]) -> int:
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
        return sum(tensor.nbytes for tensor in part.values())

    size += write("model-rest.safetensors", tensors)
    for start in range(0, layers, per_file):
        indices = range(start, min(start + per_file, layers))
        part = {f"model.layers.{i}.{name}": tensor.clone() for i in indices for name, tensor in layer.items()}
        size += write(f"model-{start:05d}.safetensors", part)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    config = json.loads((directory / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (directory / "config.json").write_text(json.dumps(config))
    return size


@pytest.mark.faults
def test_a_model_larger_than_all_workers_memory_together_completes(tmp_path: Path) -> None:
    size = repeated(tmp_path / "source", 162)
    assert size > WORKERS * MEMORY
    configuration(tmp_path, tmp_path / "source")
    overrides = [
        f"cluster.workers={WORKERS}", f"cluster.memory={MEMORY}", "formats=[FP8, BF16]", "rounding.gptq=null",
        "rounding.scale_search.grid=2", "calibration.sequences=2", "calibration.length=16", "calibration.microbatch=1",
        "calibration.holdout=0.5", "budget.bpp=8.5", f"cluster.wait={PATIENCE}",
    ]  # fmt: skip
    config = load_config(tmp_path / "config.yaml", overrides)
    result = assemble.run(config)
    assert result.total_bytes < size
    steps = steps_by_shard(read_events(Store(config.store.run)))
    peaks = {
        worker: max(step.peak_bytes for step in steps if step.worker == worker) for worker in ("worker-0", "worker-1")
    }
    assert all(0 < peak <= MEMORY for peak in peaks.values())


def test_a_worker_that_takes_more_than_it_was_given_ends_the_run(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama")
    configuration(tmp_path, source)
    config = load_config(tmp_path / "config.yaml", ["cluster.memory=901MB"])
    from tests.inprocess import in_process

    with pytest.raises(ResourceError, match=r"worker-0 took \d\.\d\d GB, cluster\.memory allows 0\.90"):
        # This process has torch, transformers and the tests in it.
        _ = b"\x01" * 901_000_000
        Run(config, open_workers=in_process()).measure()
