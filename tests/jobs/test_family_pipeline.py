"""Claims about whole runs of every architecture: they end in a verified repository, the same however they were run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from jobs.commands import verify
from jobs.pipeline.inspection import inspect
from jobs.pipeline.run import Run
from prismaquant_ray.config import load_config
from prismaquant_ray.errors import InputError
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.report.summary import summarize_probe
from tests.inprocess import after, in_process
from tests.ray_head import SETTINGS, Head
from tests.runs import digests, quantized
from tests.runs import family_configuration as configuration
from tests.tiny import make_checkpoint
from tests.tiny_families import FAMILIES, VISION_FAMILIES
from tests.waiting import PATIENCE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through(tmp_path: Path, families: Mapping[str, Path], family: str) -> None:
    images = 2 if family in VISION_FAMILIES else 0
    head = "false" if family == "gpt_oss" else "true"
    config = configuration(tmp_path / "run", families[family], f"model.quantize_lm_head={head}", images=images)
    result = quantized(config)
    assert 0 <= 6.25 - result.bpp < 0.75  # gpt_oss has four groups only
    assert verify.run(config).ok
    written = json.loads((config.store.output / "config.json").read_text())
    original = json.loads((families[family] / "config.json").read_text())
    for body in (written, original):
        body.pop("quantization_config", None)
    assert written == original
    run = Run(config, open_workers=in_process())
    kinds = {block.kind for block in run.layout.blocks}
    assert (BlockKind.VISION in kinds, BlockKind.DRAFT in kinds) == (bool(images), bool(images))
    summary = summarize_probe(run.measured().data)
    tokens = [entry.tokens for entry in summary.experts.values()]
    assert bool(tokens) == ("moe" in family or family in ("mixtral", "deepseek_v3", "deepseek_v3_fp8"))
    assert (summary.draft_agreement is not None) == bool(images)


def test_unseen_tensors_keep_their_bytes_and_types(tmp_path: Path, families: Mapping[str, Path]) -> None:
    """transformers casts A_log and a norm to BF16 when it loads; the repository keeps what the source has."""
    config = configuration(tmp_path, families["qwen3_5"], images=1)
    quantized(config)
    (shard,) = config.store.output.glob("*.safetensors")
    with safe_open(families["qwen3_5"] / "model.safetensors", "pt") as before, safe_open(shard, "pt") as after_:
        for name in ("model.language_model.layers.0.linear_attn.A_log", "mtp.fc.weight", "mtp.norm.weight"):
            assert after_.get_tensor(name).dtype == before.get_tensor(name).dtype
            assert torch.equal(after_.get_tensor(name), before.get_tensor(name))
        assert before.get_tensor("model.language_model.layers.0.linear_attn.A_log").dtype == torch.float32


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, families: Mapping[str, Path]) -> dict[str, str]:
    """What an undisturbed run of a model with everything writes."""
    config = configuration(tmp_path_factory.mktemp("expected"), families["qwen3_5_moe"], images=2)
    quantized(config)
    return digests(config.store.output)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "blocks"), [(1, 4), (2, 1), (3, 2)])
def test_images_and_draft_are_the_same_for_any_workers_and_shards(
    tmp_path: Path, families: Mapping[str, Path], expected: dict[str, str], workers: int, blocks: int
) -> None:
    config = configuration(tmp_path, families["qwen3_5_moe"], f"cluster.blocks_per_shard={blocks}", images=2)
    quantized(config, workers)
    assert digests(config.store.output) == expected


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 9, 17, 26, 33, 41])
def test_a_stopped_run_with_images_and_draft_continues(
    tmp_path: Path, families: Mapping[str, Path], expected: dict[str, str], steps: int
) -> None:
    config = configuration(tmp_path, families["qwen3_5_moe"], "cluster.blocks_per_shard=2", images=2)
    with suppress(KeyboardInterrupt):
        Run(config, open_workers=in_process(2, after(steps))).measure()
    recorded = {path: path.read_bytes() for path in config.store.run.rglob("record.json")}
    quantized(config)
    assert digests(config.store.output) == expected
    assert {path: path.read_bytes() for path in recorded} == recorded, "finished work was done again"
    left = [path.name for path in config.store.run.rglob("boundary*")]
    assert not left, "boundaries of a finished run are gone"


@pytest.mark.faults
def test_the_command_does_the_same_on_ray_and_tells_of_experts_and_draft(
    tmp_path: Path, families: Mapping[str, Path], expected: dict[str, str], head: Head
) -> None:
    config = configuration(tmp_path, families["qwen3_5_moe"], images=2)
    command = [sys.executable, "-m", "jobs", "quantize", str(tmp_path / "config.yaml")]
    command += ["--set", "cluster.workers=2", "--set", f"cluster.address={head.address}", "--set", "cluster.device=cpu"]
    environment = {**os.environ, **SETTINGS}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert digests(config.store.output) == expected
    assert "experts of 5 layers: " in done.stdout
    assert "draft head agrees with the model's best guess: BF16 0." in done.stdout


def test_a_weight_on_the_draft_needs_no_new_measurement(tmp_path: Path, families: Mapping[str, Path]) -> None:
    config = configuration(tmp_path, families["qwen3_5"], images=1)
    quantized(config)
    losses = {}
    for weight in (0.0, 1.0):
        other = load_config(tmp_path / "config.yaml", [f"allocation.mtp_weight={weight}"])
        losses[weight] = Run(other, open_workers=in_process()).measured().plan.predicted_loss
    assert losses[0.0] < losses[1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"text": ""}, "empty"),
    ],
)
def test_bad_images_are_refused_before_anything_is_written(
    tmp_path: Path, families: Mapping[str, Path], change: dict[str, str], message: str
) -> None:
    config = configuration(tmp_path, families["qwen3_5"], images=1)
    entry = json.loads((tmp_path / "captions.jsonl").read_text())
    (tmp_path / "captions.jsonl").write_text(json.dumps({**entry, **change}))
    with pytest.raises(InputError, match=message):
        quantized(config)
    assert not config.store.output.exists()


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, families: Mapping[str, Path]) -> None:
    copy = tmp_path / "model"
    shutil.copytree(families["qwen3_moe"], copy)
    for content in ("{", "[]", '{"model": {"type": "Nothing"}}'):
        (copy / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match="no tokenizer can be loaded") as caught:
            _ = Run(configuration(tmp_path / "run", copy)).calibration
        assert "\n" not in str(caught.value)


def test_a_repository_that_was_not_written_to_its_end_is_refused_by_verify(
    tmp_path: Path, families: Mapping[str, Path]
) -> None:
    config = configuration(tmp_path, families["qwen3_moe"])
    config.store.output.mkdir(parents=True)
    manifest = config.store.output / "prismaquant.json"
    for content, message in (('{"complete": false, "files": {}}', "not written to its end"), ("{", "is not JSON")):
        manifest.write_text(content)
        with pytest.raises(InputError, match=message):
            verify.run(config)
    assert not config.store.run.exists()


def test_images_for_a_model_that_cannot_see_are_refused(tmp_path: Path) -> None:
    config = configuration(tmp_path, make_checkpoint(tmp_path / "llama", "llama"), images=1)
    with pytest.raises(InputError, match=r"calibration\.images is given, but LlamaForCausalLM has no vision tower"):
        quantized(config)


def test_other_images_are_another_run(tmp_path: Path, families: Mapping[str, Path]) -> None:
    config = configuration(tmp_path, families["qwen3_5"], images=1)
    _ = Run(config).store
    configuration(tmp_path, families["qwen3_5"], images=2)
    with pytest.raises(InputError, match=r"another calibration\.images"):
        _ = Run(config).store


# Planning without weights ---------------------------------------------------------------------------------------

REFERENCE = {  # directory: blocks, billions of parameters in quantizable Linears, gigabytes of the BF16 checkpoint
    "qwen3.6-27b": (27 + 1 + 64 + 1, 25.2, 55.6),
    "qwen3.6-35b-a3b": (27 + 1 + 40 + 1, 34.9, 71.9),
    "qwen3.5-122b-a10b": (27 + 1 + 48 + 1, 123.5, 250.2),
}


@pytest.mark.parametrize("model", REFERENCE)
def test_reference_models_are_planned_from_their_configuration(tmp_path: Path, model: str) -> None:
    """55.56 GB is what the index of Qwen3.6-27B states; nothing of it is here but the configuration."""
    blocks, parameters, source = REFERENCE[model]
    overrides = [
        "model.dtype=bfloat16",
        "calibration.sequences=128",
        "calibration.length=1024",
        f"store.run={tmp_path / 'run'}",
        f"store.output={tmp_path / 'output'}",
    ]
    config = load_config(ROOT / f"configs/models/{model}/inspect.yaml", overrides)
    machines = ["1x24GB", "1x80GB", "8x80GB", "1x128GB", "1xGB10", "8xh100"]
    result = inspect(config, machines=machines)
    assert result.blocks == blocks
    assert result.quantizable_parameters / 1e9 == pytest.approx(parameters, abs=0.05)
    assert result.source_bytes / 1e9 == pytest.approx(source, abs=0.05)
    assert "no weights" in result.guesses[0]
    plans = {plan.machine: plan for plan in result.machines}
    assert list(plans) == machines
    sizes = {"GB10": 128e9, "h100": 80e9}
    for plan in plans.values():
        card = plan.machine.partition("x")[2]
        memory = sizes.get(card) or float(card.removesuffix("GB")) * 1e9
        # 8 % are left to fragments and workspaces.
        assert plan.fits == (plan.worker_bytes <= 0.92 * memory)
        assert 1 <= plan.blocks_per_shard <= max(1, plan.fitting)
        assert (plan.host_bytes > 0) == (card != "GB10"), "a chip with one memory has no other"
        assert bool(plan.stages) == (card in sizes)
    assert plans["1x24GB"].fits == (model != "qwen3.5-122b-a10b")
    assert plans["1x80GB"].fits
    assert plans["8x80GB"].blocks_per_shard <= plans["1x80GB"].blocks_per_shard
    assert plans["1x128GB"].blocks_per_shard > plans["1x80GB"].blocks_per_shard
    assert plans["1xGB10"].fitting < plans["1x128GB"].fitting, "what the host keeps counts, too"
    assert plans["8xh100"].blocks_per_shard == plans["8x80GB"].blocks_per_shard
    assert [stage.stage for stage in plans["8xh100"].stages] == [
        "forward pass", "encoding", "backward pass", "assembly", "verification",
    ]  # fmt: skip


@pytest.mark.parametrize("machine", ["80GB", "0x80GB", "1x", "1xmuch", "x80GB", "0xH100", "8xH300"])
def test_a_machine_that_is_none_is_refused(machine: str) -> None:
    config = load_config(ROOT / "configs/models/qwen3.6-27b/inspect.yaml")
    with pytest.raises(InputError, match=f"--for {machine}"):
        inspect(config, machines=[machine])
