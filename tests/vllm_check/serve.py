"""An engine on one directory after another: logits of fixed prompts, schemes, drafts. A process of its own."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.vllm_check import media

PROMPT_LENGTHS = (48, 33, 7)
IMAGE_PROMPT_LENGTH = 12
MAX_LENGTH = 256
GENERATED = 16
LINES = 60


class Task(NamedTuple):
    """What to serve, where `report.json` and `logits.safetensors` go, and what to compare and show.

    When it fails, the report is the end of its traceback, as `failed`.
    """

    directory: str
    output: str
    reference: str | None = None
    images: Sequence[str] = ()
    draft: bool = False


def main() -> None:
    """Serve every task of a JSON list on standard input, in turn."""
    media.prepare()
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.vllm_check import emulation

    emulation.register()
    for fields in json.load(sys.stdin):
        task = Task(*fields)
        output = Path(task.output)
        output.mkdir()
        try:
            report, logits = _serve(task)
        # Whatever vLLM ends with, the others are served.
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            ImportError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ):
            report, logits = {"failed": traceback.format_exc().splitlines()[-LINES:]}, {}
        # Only now does nothing hold an engine that failed.
        gc.collect()
        cleanup_dist_env_and_memory()
        save_file(logits, output / "logits.safetensors")
        (output / "report.json").write_text(json.dumps(report))


def _serve(task: Task) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from vllm import LLM

    started = time.perf_counter()
    engine = LLM(task.directory, **_options(task))
    loaded = time.perf_counter()
    report = _layers(engine, task)
    logits = _logits(engine, task)
    if task.draft:
        report["draft"], logits["draft"] = _draft(engine, _config(task.directory))
    report["seconds"] = {"load": round(loaded - started, 1), "run": round(time.perf_counter() - loaded, 1)}
    return report, logits


def _config(directory: str) -> dict[str, Any]:
    return json.loads((Path(directory) / "config.json").read_text())


def _options(task: Task) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": MAX_LENGTH,
        "max_num_batched_tokens": MAX_LENGTH,
        "max_num_seqs": 2,
        "disable_log_stats": False,
        # Without this vLLM does not notice a tensor that a quantized model lacks.
        "model_loader_extra_config": {"enable_weights_track": True},
    }
    if "vision_config" in _config(task.directory):
        shown = {"limit_mm_per_prompt": {"image": len(task.images), "video": 0}}
        options |= shown if task.images else {"language_model_only": True}
    if task.draft:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
    return options


def _layers(engine: Any, task: Task) -> dict[str, Any]:
    from tests.vllm_check.layers import caches, describe

    directory, reference = Path(task.directory), None if task.reference is None else Path(task.reference)
    report = {
        "layers": describe(_runner(engine).model, directory, reference),
        "caches": caches(_runner(engine).model),
    }
    if task.draft:
        # The draft layer borrows the output head.
        known = {layer["name"] for layer in report["layers"]}
        report["draft_caches"] = caches(_runner(engine).drafter.model)
        found = describe(_runner(engine).drafter.model, directory, reference)
        report["draft_layers"] = [layer for layer in found if layer["name"] not in known]
    return report


def _runner(engine: Any) -> Any:
    return engine.collective_rpc(lambda worker: getattr(worker, "worker", worker).model_runner)[0]


# ---------------------------------------------------------------------------------------------- logits


def _logits(engine: Any, task: Task) -> dict[str, Tensor]:
    """Logits (T, V) after every token but the last of each prompt: `text`, `rounded` and, with images, `images`."""
    from tests.vllm_check.emulation import ROUNDING

    config = _config(task.directory)
    recorder = _Recorder(_runner(engine).model)
    prompts = [{"prompt_token_ids": tokens} for tokens in _prompts(config, PROMPT_LENGTHS)]
    found = {"text": recorder.logits(engine, prompts)}
    if task.images:
        found["images"] = recorder.logits(engine, [_image_prompt(config, task.images)])
    ROUNDING.on = True
    found["rounded"] = recorder.logits(engine, prompts)
    ROUNDING.on = False
    return found


class _Recorder:
    """Listens to a model's logits: those of a prompt are computed when its log probabilities are asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.heard: list[Tensor] = []
        original = model.compute_logits

        def compute_logits(*arguments: Any, **keywords: Any) -> Tensor:
            logits = original(*arguments, **keywords)
            self.heard.append(logits.detach().float().clone())
            return logits

        model.compute_logits = compute_logits

    def logits(self, engine: Any, prompts: list[dict[str, Any]]) -> Tensor:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
        found = []
        for prompt in prompts:
            self.heard.clear()
            output = engine.generate(prompt, sampling, use_tqdm=False)[0]
            positions = len(output.prompt_token_ids) - 1
            found.append(next(heard for heard in self.heard if len(heard) == positions))
        return torch.cat(found)


def _prompts(config: dict[str, Any], lengths: tuple[int, ...]) -> list[list[int]]:
    """Random tokens, the same at every call; those with a meaning of their own are commonly first or last."""
    vocabulary = config.get("text_config", config)["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, min(vocabulary, 300), (length,), generator=generator).tolist() for length in lengths]


def _image_prompt(config: dict[str, Any], images: Sequence[str]) -> dict[str, Any]:
    from PIL import Image

    (text,) = _prompts(config, (IMAGE_PROMPT_LENGTH,))
    place = [config["vision_start_token_id"], config["image_token_id"], config["vision_end_token_id"]]
    pictures = [Image.open(path).convert("RGB") for path in images]
    return {
        "prompt_token_ids": [*text[:4], *place * len(pictures), *text[4:]],
        "multi_modal_data": {"image": pictures},
    }


# ---------------------------------------------------------------------------------------------- drafts


def _draft(engine: Any, config: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Generate with speculation: what came out, how many tokens were proposed and how many kept; the draft's logits."""
    from vllm import SamplingParams

    recorder = _Recorder(_runner(engine).drafter.model)
    sampling = SamplingParams(max_tokens=GENERATED, min_tokens=GENERATED, temperature=0, detokenize=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in _prompts(config, PROMPT_LENGTHS)]
    before = _counters(engine)
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    after = _counters(engine)
    report = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "proposed": after["draft"] - before["draft"],
        "accepted": after["accepted"] - before["accepted"],
    }
    return report, torch.cat(recorder.heard)


def _counters(engine: Any) -> dict[str, int]:
    values = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return {kind: int(values.get(f"vllm:spec_decode_num_{kind}_tokens", 0)) for kind in ("draft", "accepted")}


if __name__ == "__main__":
    main()
