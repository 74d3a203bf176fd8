"""Checkpoints as they are found: what is unusual and right works, what contradicts itself is refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.commands.inspect import run as inspect
from jobs.commands.probe import render
from jobs.pipeline.assembly import verify
from jobs.pipeline.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.report.summary import summarize_probe
from tests.architectures import WORKING, make_architecture
from tests.repositories import tensors_of
from tests.runs import configuration, measured, quantized
from tests.tiny import make_checkpoint

_FAST = (
    "rounding.gptq=null",
    "rounding.scale_search.grid=2",
    "calibration.sequences=4",
    "formats=[NVFP4, MXFP8, BF16]",
)


def changed(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """The tensors of a checkpoint in one file, after a change."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def reconfigured(directory: Path, **settings: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **settings}))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", "llama_untied")


def works(tmp_path: Path, source: Path, bpp: float = 7.0) -> Config:
    config = configuration(tmp_path / "run", source, *_FAST, bpp=bpp)
    quantized(config)
    assert verify(config).bpp <= bpp
    return config


def written_config(config: Config) -> dict[str, Any]:
    """The repository's config.json, which must be JSON for every reader."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (Path(config.store.output) / "config.json").read_text()
    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def test_a_quantization_config_of_null_is_none(tmp_path: Path, source: Path) -> None:
    reconfigured(source, quantization_config=None)
    config = works(tmp_path, source)
    assert written_config(config)["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("spelling", [math.inf, {"__float__": "Infinity"}], ids=["bare", "tagged"])
def test_infinity_in_the_configuration_is_a_number(tmp_path: Path, spelling: Any) -> None:
    source = make_architecture(tmp_path / "source", WORKING["mamba2"])
    reconfigured(source, time_step_limit=[0.0, spelling])
    config = works(tmp_path, source)
    assert written_config(config)["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path: Path, source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:10], names[10:]), start=1):
        save_file({name: tensors[name] for name in part}, source / f"model-0000{number}-of-00002.safetensors")
    works(tmp_path, source)
    (source / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors is missing, and there is no model\.saf"):
        inspect(configuration(tmp_path / "other", source))
    save_file(tensors, source / "other-00001-of-00001.safetensors")
    with pytest.raises(InputError, match="belong to different checkpoints"):
        inspect(configuration(tmp_path / "other", source))


def test_chat_templates_in_their_folder_are_copied_and_other_folders_named(tmp_path: Path, source: Path) -> None:
    for file in ("additional_chat_templates/tool_use.jinja", "original/params.json"):
        (source / file).parent.mkdir()
        (source / file).write_text("{{ tools }}")
    config = works(tmp_path, source)
    output = Path(config.store.output)
    assert (output / "additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    assert not (output / "original").exists()
    assert "files in original/ are not copied" in inspect(config).guesses


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_head_beside_the_embedding_it_is_tied_to_must_be_equal(tmp_path: Path, source: Path, scale: float) -> None:
    def tie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * scale

    changed(source, tie)
    reconfigured(source, tie_word_embeddings=True)
    if scale == 1.0:
        works(tmp_path, source)
        return
    with pytest.raises(InputError, match=r"lm_head\.weight is not model\.embed_tokens\.weight; set"):
        measured(configuration(tmp_path / "run", source, *_FAST))


@pytest.mark.parametrize("wide", ["all", "some"])
def test_no_budget_is_exceeded_because_the_source_has_32_bits(tmp_path: Path, source: Path, wide: str) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if wide == "all" or name.endswith("down_proj.weight"):
                tensors[name] = tensor.float()

    changed(source, widen)
    if wide == "all":
        reconfigured(source, dtype="float32")
    config = works(tmp_path, source, bpp=15.0)
    assert written_config(config)["dtype"] == "bfloat16"
    output = load_file(Path(config.store.output) / "model-00001-of-00001.safetensors")
    assert {tensor.dtype for tensor in output.values() if tensor.ndim > 1} & {torch.float32} == set()
    assert (output["model.norm.weight"].dtype is torch.float32) == (wide == "all")


def test_what_has_no_effect_costs_nothing_and_is_named(tmp_path: Path, source: Path) -> None:
    """LLaMA-Pro inserts blocks whose output projections are zeros."""
    from rich.console import Console

    def silence(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
        tensors["model.layers.1.mlp.down_proj.weight"].zero_()

    changed(source, silence)
    config = works(tmp_path, source)
    summary = Run(config).repairing(lambda known: summarize_probe(known.data))
    silent = {name.removeprefix("model.layers.1.") for name in summary.without_gradient}
    assert silent == {f"self_attn.{name}_proj" for name in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}
    console = Console(record=True, width=200)
    render(summary, console)
    text = " ".join(console.export_text().split())
    assert "note: no gradient reaches model.layers.1.self_attn.q_proj and 4 more; every format" in text


def test_a_linear_that_no_format_takes_stays(tmp_path: Path) -> None:
    config = works(tmp_path, make_checkpoint(tmp_path / "source", "llama_untied", heads=1, kv_heads=1, head_dim=24))
    output = load_file(Path(config.store.output) / "model-00001-of-00001.safetensors")
    assert output["model.layers.0.self_attn.o_proj.weight"].dtype is torch.bfloat16


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path, source: Path) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    token = max(vocabulary, key=lambda entry: vocabulary[entry])
    vocabulary[token] += 50
    tokenizer["model"]["merges"] = [merge for merge in tokenizer["model"]["merges"] if "".join(merge) in vocabulary]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = tmp_path / "text.txt"
    text.write_text(token.replace("Ġ", " ") * 4000)
    config = configuration(tmp_path / "run", source, f"calibration.text={text}")
    with pytest.raises(InputError, match=r"the tokenizer makes token \d+ \('.*'\), the embedding has 320 rows"):
        measured(config)


def test_a_model_whose_head_is_nowhere_has_no_loss(tmp_path: Path, source: Path) -> None:
    changed(source, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"there is no lm_head\.weight, and config\.json does not tie the output head"):
        inspect(configuration(tmp_path, source))


def test_a_decoder_stored_without_its_prefix_is_written_with_it(tmp_path: Path, source: Path) -> None:
    config = works(tmp_path / "with", source)
    changed(
        source,
        lambda tensors: [tensors.setdefault(name.removeprefix("model."), tensors.pop(name)) for name in [*tensors]],
    )
    assert "layers.0.mlp.up_proj.weight" in load_file(source / "model.safetensors")
    again = works(tmp_path / "without", source)
    written, expected = (tensors_of(Path(each.store.output)) for each in (again, config))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_a_configuration_that_transformers_does_not_accept_is_refused(tmp_path: Path, source: Path) -> None:
    reconfigured(source, num_attention_heads=3)
    with pytest.raises(InputError, match=r"transformers does not accept config\.json: .*attention heads"):
        inspect(configuration(tmp_path, source))


def test_a_class_that_needs_another_package_says_which(tmp_path: Path) -> None:
    """Gemma 3n's vision tower is of a library that this project does not install."""
    directory = tmp_path / "source"
    directory.mkdir()
    body = {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n"}
    (directory / "config.json").write_text(json.dumps(body))
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"needs a package that is not installed .*pip install timm"):
        inspect(configuration(tmp_path, directory))
