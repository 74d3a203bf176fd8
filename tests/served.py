"""Repositories to be served: measured and rounded by the product itself, with a plan that uses all those formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.pipeline.run import Run
from prismaquant_ray.cache_rounding import CacheScale, scale_tensors
from prismaquant_ray.compressed.dequantize import QuantizedRepository
from prismaquant_ray.formats import FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.repository.quantization_config import build_quantization_config
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.repository.writer import write_repository
from prismaquant_ray.storage.store import Store
from tests.architectures import WORKING, YARN, make_architecture
from tests.inprocess import in_process
from tests.repositories import mixed, rewrite
from tests.runs import family_configuration as configuration
from tests.tiny import MODELS, make_checkpoint
from tests.tiny_families import FAMILIES as TINY
from tests.tiny_families import VISION_FAMILIES, make_family

#: The default formats, and what limits on time add: all of them in one model.
FORMATS = (FormatName.NVFP4, FormatName.FP8, FormatName.NVFP4A16, FormatName.MXFP8, FormatName.BF16)

#: The formats that are off by default.
OTHER_FORMATS = tuple(name for name in FormatName if name not in FORMATS)

#: Models of each family.
FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "gpt_oss",
)
#: Models in formats that are off by default; one of experts, and one whose source has FP8 blocks.
OTHERS = ("llama in other formats", "qwen3_moe in other formats", "deepseek_v3_fp8 in other formats")
#: Models of architectures without a family, all but those that vLLM does not have or does not run on a CPU.
ARCHITECTURES = tuple(name for name, architecture in WORKING.items() if architecture.unserved is None)
#: Models that are also served with an FP8 KV cache: full and sliding attention, hybrid with a draft head, with sinks.
CACHED = ("llama", "gemma3_text", "qwen3_5", "gpt_oss")
# Whole blocks of 128 × 128, and kernels that take no fewer.
_BLOCKS = {
    "qwen3_moe": {"moe_intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 7},
    "deepseek_v3_fp8": {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128},
}
# vLLM's CPU build knows latent attention of DeepSeek-V3's own widths only.
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "rope_parameters": YARN}


def everywhere(layout: Layout) -> dict[str, FormatName]:
    """Every group in BF16."""
    return {group.name: FormatName.BF16 for group in layout.groups}


def _cache_in_fp8(directory: Path, scheme: dict[str, Any] | None, scales: dict[str, CacheScale]) -> None:
    """Give a model in BF16 an FP8 KV cache."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    rewrite(directory, scale_tensors(scales))


def make_repository(directory: Path, name: str, *, cached: bool = False) -> tuple[Path, Path, dict[str, str]]:
    """A repository, its BF16 copy by `dequantize`, and the format of every module that could be quantized.

    The family is the name's first word. Where they are `cached`, both have an FP8 KV cache with the same scales.
    """
    family, formats = name.partition(" ")[0], OTHER_FORMATS if name in OTHERS else FORMATS
    if family in WORKING:
        source = make_architecture(directory / "source", WORKING[family])
    elif family in TINY:
        latent = _LATENT if family.startswith("deepseek") else {}
        source = make_family(directory / "source", family, **latent, **(_BLOCKS[family] if name in OTHERS else {}))
    else:
        # vLLM's Qwen2 knows no head_dim of its own.
        heads = {"heads": 2, "kv_heads": 1} if family == "qwen2" else {}
        source = make_checkpoint(directory / "source", family, hidden=128, intermediate=256, head_dim=64, **heads)
    # Tied heads stay, and so does GPT-OSS's.
    tied = family in MODELS and MODELS[family][2]
    kept = tied or family == "gpt_oss" or family in WORKING
    head = f"model.quantize_lm_head={'false' if kept else 'true'}"
    listed = f"formats=[{', '.join(formats)}, BF16]" if name in OTHERS else f"formats=[{', '.join(formats)}]"
    config = configuration(directory / "run", source, head, listed, images=2 if family in VISION_FAMILIES else 0)
    run = Run(config, open_workers=in_process())
    run.measure()
    choice = mixed(run.layout, formats)
    repository, copy = directory / "repository", directory / "copy"
    known = run.measured()
    shipped = known.shipped(choice)
    write_repository(shipped, run.layout, choice, known.candidates, Store(repository), manifest={"target": "mixed"})
    report = verify_repository(Store(repository), shipped, run.layout, choice, known.candidates)
    assert report.ok, report.problems
    QuantizedRepository(Store(repository)).write(Store(copy))
    if cached:
        scales = known.cache_scales(choice)
        write_repository(
            shipped, run.layout, choice, known.candidates, Store(repository), cache=scales, manifest={"target": "mixed"}
        )
        report = verify_repository(Store(repository), shipped, run.layout, choice, known.candidates, cache=scales)
        assert report.ok, report.problems
        _cache_in_fp8(copy, build_quantization_config(run.layout, everywhere(run.layout), cache=True), scales)
    expected = {
        name: str(choice[group.name])
        for group in run.layout.groups
        for linear in group.linears
        for name in linear.names
    }
    return repository, copy, expected
