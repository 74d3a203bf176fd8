"""A repository is the source and the chosen candidates, byte for byte, and appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.base import decompress_module
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.forward.candidates import CandidateFile, Candidates, shipped
from prismaquant_ray.forward.scale_search import nearest
from prismaquant_ray.layout import LinearSpec
from prismaquant_ray.model.layout_builder import build_layout
from prismaquant_ray.repository.manifest import MANIFEST
from prismaquant_ray.repository.routing import transformers_route
from prismaquant_ray.repository.staging import check_output, staged_directory
from prismaquant_ray.repository.writer import write_repository
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.files import INDEX
from prismaquant_ray.storage.store import Store
from tests.repositories import (
    DEFAULT_FORMATS,
    SEVEN,
    Choice,
    Model,
    make_model,
    mixed,
    mixed_choice,
    shards,
    store_candidates,
    tensors_of,
    uniform,
)
from tests.tiny import make_checkpoint, random_tokens, read_config
from tests.tiny_families import FAMILIES, VISION_FAMILIES, dequantize_blocks, make_family


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Tied embeddings, three layers, two source shards."""
    return make_model(tmp_path_factory.mktemp("model"), "llama", layers=3, shards=2)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def source_tensors(path: Path) -> dict[str, Tensor]:
    """The weights of a source; those in blocks of FP8 are what they stand for."""
    stored = tensors_of(path)
    found = {}
    for name, tensor in stored.items():
        if (scale := stored.get(f"{name}_scale_inv")) is not None:
            found[name] = dequantize_blocks(tensor, scale).to(torch.bfloat16)
        elif not name.endswith("_scale_inv"):
            found[name] = tensor
    return found


def directory(checkpoint: Checkpoint) -> Path:
    assert checkpoint.store.path is not None
    return checkpoint.store.path


# Contents -----------------------------------------------------------------------------------------------------


def test_everything_unquantized_is_the_sources_and_everything_else_the_candidates(model: Model, tmp_path: Path) -> None:
    is_source_and_candidates(model, mixed(model.layout), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_experts_towers_and_drafts_too(family: str, family_models: Callable[[str], Model], tmp_path: Path) -> None:
    model = family_models(family)
    choice = mixed_choice(model.layout)
    assert set(choice.values()) >= set(DEFAULT_FORMATS) - ({FormatName.BF16} if family == "gpt_oss" else set())
    is_source_and_candidates(model, choice, tmp_path)


def is_source_and_candidates(model: Model, choice: Choice, output: Path) -> None:
    model.write(output, choice)
    expected = source_tensors(directory(model.source))
    for group in model.layout.groups:
        if FORMATS[choice[group.name]].codec is not None:
            for source in {source for linear in group.linears for source in linear.sources}:
                del expected[source]
    for module, (_, tensors) in model.stored(choice).items():
        expected |= {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}
    written = tensors_of(output)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(written[name]) == raw(tensor), name


def test_all_bf16_is_the_source(model: Model, tmp_path: Path) -> None:
    is_the_source(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (directory(model.source) / "config.json").read_bytes()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3_fp8", "qwen3_5_moe"])
def test_all_bf16_is_the_source_however_its_experts_are_stored(
    family: str, family_models: Callable[[str], Model], tmp_path: Path
) -> None:
    is_the_source(family_models(family), tmp_path)
    config = read_config(directory(family_models(family).source))
    assert (config.pop("quantization_config", None) is not None) is (family == "deepseek_v3_fp8")
    assert read_config(tmp_path) == config


def is_the_source(model: Model, output: Path) -> None:
    repository = model.write(output, uniform(model.layout, FormatName.BF16))
    source, written = source_tensors(directory(model.source)), tensors_of(output)
    assert {name: raw(tensor) for name, tensor in written.items()} == {name: raw(t) for name, t in source.items()}
    bits = 8 * sum(t.nbytes for t in source.values()) / sum(t.numel() for t in source.values())
    assert (repository.bpp, repository.bits_all_parameters) == (16, bits)
    # Some norms, biases and decays are in float32.
    assert 16 <= bits < 16.1


def test_unknown_tensors_and_other_dtypes_pass_through(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "made", "llama_untied")
    tensors = load_file(source / "model.safetensors")
    extra = {
        "mtp.layers.0.mlp.down_proj.weight": torch.randn(4, 6).bfloat16(),
        "vision.position": torch.randn(4, 6),
        "vision.table": torch.arange(5),
        "vision.flags": torch.tensor([True, False]),
        "vision.half": torch.randn(3).half(),
        "vision.empty": torch.empty(0, 3),
        "vision.scalar": torch.tensor(1.5, dtype=torch.float64),
    }
    save_file(tensors | extra, source / "model.safetensors", {"format": "pt"})
    model = make_model_from(source, tmp_path)
    choice = mixed(model.layout)
    model.write(tmp_path / "out", choice)
    written = tensors_of(tmp_path / "out")
    for name, tensor in extra.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(written[name]) == raw(tensor)
    assert "lm_head.weight" in written
    report = model.verify(tmp_path / "out", choice)
    assert report.ok, report.problems


def make_model_from(source: Path, tmp_path: Path) -> Model:
    checkpoint = Checkpoint(Store(source))
    layout = build_layout(checkpoint)[1]
    return Model(checkpoint, layout, store_candidates(checkpoint, layout, Store(tmp_path / "run")))


@pytest.mark.parametrize("architecture", ["llama", "llama_untied"])
def test_a_head_is_written_only_when_the_source_has_one(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, architecture)
    model.write(tmp_path / "out", uniform(model.layout, FormatName.FP8))
    untied = architecture == "llama_untied"
    assert ("lm_head.weight" in tensors_of(tmp_path / "out")) is untied
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is not untied


def test_the_configuration_is_the_sources_with_one_key_more(model: Model, tmp_path: Path) -> None:
    model.write(tmp_path, mixed(model.layout))
    source, written = read_config(directory(model.source)), read_config(tmp_path)
    assert list(written) == [*source, "quantization_config"]
    assert {key: written[key] for key in source} == source


def test_other_files_are_copied_and_other_weights_and_folders_are_not(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "made", "qwen3")
    copied = {"README.md": b"# x\n", "LICENSE": b"\xff\x00licence", "merges.txt": b"a b\n"}
    for name, data in copied.items():
        (source / name).write_bytes(data)
    (source / "pytorch_model.bin").write_bytes(b"1" * 100)
    (source / "consolidated.safetensors").write_bytes(b"1" * 100)
    (source / MANIFEST).write_text('{"from": "an earlier run"}')
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    model = make_model_from(source, tmp_path)
    output = tmp_path / "out"
    repository = model.write(output, mixed(model.layout))
    for name in (*copied, "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    found = {entry.name: entry.stat().st_size for entry in output.iterdir()}
    assert found == repository.files
    assert not found.keys() & {"pytorch_model.bin", "consolidated.safetensors", "original"}
    assert "from" not in json.loads((output / MANIFEST).read_text())


# Shards and sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 5_000, 50_000, 5_000_000_000])
def test_shards_hold_at_most_the_limit_in_the_sources_order(limit: int, model: Model, tmp_path: Path) -> None:
    choice = mixed(model.layout)
    repository = model.write(tmp_path, choice, shard=limit)
    files = shards(tmp_path)
    count = len(files)
    assert list(files) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for tensors in files.values():
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit or len(tensors) == 1
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files.values() for t in file.values())
    assert repository.sha256 == {file: hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in files}
    order = list(dict.fromkeys(name.rpartition(".")[0] for name in Checkpoint(Store(tmp_path)).tensors))
    assert order == [name.rpartition(".")[0] for name in model.source.tensors]
    report = model.verify(tmp_path, choice)
    assert report.ok, report.problems


def test_sizes_are_those_of_the_files_and_bits_those_of_the_formats(model: Model, tmp_path: Path) -> None:
    are_those_of_the_files(model, mixed(model.layout), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_bits_count_every_expert(family: str, family_models: Callable[[str], Model], tmp_path: Path) -> None:
    are_those_of_the_files(family_models(family), mixed_choice(family_models(family).layout), tmp_path)


def are_those_of_the_files(model: Model, choice: Choice, output: Path) -> None:
    repository = model.write(output, choice)
    assert repository.total_bytes == sum(file.stat().st_size for file in output.iterdir())
    weight_bytes = sum(
        (linear.experts or 1) * FORMATS[choice[group.name]].weight_bytes(linear.out_features, linear.in_features)
        for group in model.layout.groups
        for linear in group.linears
    )
    quantizable = sum(weight.numel() for weight in model.weights().values())
    assert repository.bpp == 8 * weight_bytes / model.layout.parameters == 8 * weight_bytes / quantizable
    written = sum(tensor.nbytes for tensor in tensors_of(output).values())
    parameters = sum(tensor.numel() for tensor in source_tensors(directory(model.source)).values())
    assert repository.bits_all_parameters == 8 * written / parameters


def test_the_manifest_states_choice_sizes_digests_and_the_callers_facts(model: Model, tmp_path: Path) -> None:
    choice = mixed(model.layout)
    repository = model.write(tmp_path, choice)
    body = json.loads((tmp_path / MANIFEST).read_text())
    assert body["choice"] == {group: str(name) for group, name in choice.items()}
    assert body["run"] == {"target": "bpp=5"}
    assert body["complete"] is True
    assert body["sha256"].items() >= repository.sha256.items()
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in body["files"]}
    assert body["sha256"] == digests
    assert {**body["files"], MANIFEST: repository.files[MANIFEST]} == repository.files
    assert (body["bpp"], body["bits_all_parameters"]) == (repository.bpp, repository.bits_all_parameters)


def test_two_writes_are_the_same_bytes(model: Model, tmp_path: Path) -> None:
    choice = mixed(model.layout)
    model.write(tmp_path / "one", choice, shard=9_000)
    model.write(tmp_path / "two", dict(reversed(choice.items())), shard=9_000)
    for file in (tmp_path / "one").iterdir():
        if file.name != MANIFEST:  # lists the choice in the caller's order
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


# Readers --------------------------------------------------------------------------------------------------------


# It does not read experts that are quantized one by one.
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3_5", "qwen3_5_text", "gpt_oss"])
def test_transformers_loads_all_seven_formats_and_decodes_the_same_weights(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, name, **({} if name in FAMILIES else {"layers": 3}))
    choice = mixed(model.layout)
    assert set(choice.values()) == set(SEVEN) or name == "gpt_oss"
    model.write(tmp_path / "out", choice, shard=50_000)
    auto = AutoModelForImageTextToText if name in VISION_FAMILIES else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    stored, source = model.stored(choice), model.weights()
    for linear in model.layout.linears():
        if linear.name.startswith("mtp."):
            continue  # nor does it load draft heads
        module = loaded.get_submodule(linear.name)
        decompress_module(module)
        if linear.name in stored:
            format_name, tensors = stored[linear.name]
            codec = FORMATS[format_name].codec
            assert codec is not None
            expected = codec.decode(tensors)
        else:
            expected = source[linear.name]
        assert module.weight.dtype == torch.bfloat16
        assert raw(module.weight.detach()) == raw(expected), linear.name
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a river").input_ids


def test_transformers_runs_it_and_its_logits_are_near_the_sources(model: Model, tmp_path: Path) -> None:
    model.write(tmp_path, mixed(model.layout, (FormatName.MXFP8, FormatName.FP8, FormatName.BF16)))
    tokens = random_tokens(2, 32)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits.float().log_softmax(-1)
        source = AutoModelForCausalLM.from_pretrained(directory(model.source))(tokens).logits.float().log_softmax(-1)
    divergence = (source.exp() * (source - loaded)).sum(-1).mean()
    assert 0 < divergence < 0.05


def test_compressed_tensors_decompresses_every_module_as_we_do(model: Model, tmp_path: Path) -> None:
    choice = mixed(model.layout)
    assert decompressed(model, choice, tmp_path) == {*SEVEN} - {FormatName.BF16}


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_decompresses_every_expert_as_we_do(
    family: str, family_models: Callable[[str], Model], tmp_path: Path
) -> None:
    model = family_models(family)
    assert decompressed(model, mixed_choice(model.layout), tmp_path) == {FormatName.NVFP4, FormatName.MXFP8}


def decompressed(model: Model, choice: Choice, output: Path) -> set[FormatName]:
    """The formats of every module that compressed-tensors decodes as we do."""
    model.write(output, choice)
    config = read_config(output)["quantization_config"]
    schemes = QuantizationConfig.model_validate(config).config_groups
    repository = Checkpoint(Store(output))
    seen = set()
    for module, (name, stored) in model.stored(choice).items():
        names = {suffix: f"{module}.{suffix}" for suffix in stored}
        tensors = dict(zip(names, repository.read(names.values()).values(), strict=True))
        scheme = schemes[str(transformers_route(config, module))]
        theirs = BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(tensors, scheme)["weight"]
        codec = FORMATS[name].codec
        assert codec is not None
        assert raw(theirs.to(torch.bfloat16)) == raw(codec.decode(tensors)), module
        seen.add(name)
    return seen


# Refusals and failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_a_quantized_source_is_refused_before_anything_is_written(place: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama")
    scheme = {"quantization_config": {"quant_method": "fp8"}}
    model.source.config.update(scheme if place == "top" else {"text_config": scheme})
    with pytest.raises(InputError, match="already quantized"):
        model.write(tmp_path / "out", uniform(model.layout, FormatName.FP8))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_or_foreign_candidate_is_refused_before_anything_is_written(model: Model, tmp_path: Path) -> None:
    choice = uniform(model.layout, FormatName.FP8)
    artifacts = dict(model.candidates.artifacts)
    del artifacts[1, FormatName.FP8]
    swapped = {**model.candidates.artifacts, (1, FormatName.FP8): artifacts[1, FormatName.MXFP8]}
    for number, found in enumerate((artifacts, swapped)):
        output = Store(tmp_path / str(number))
        candidates = Candidates(model.candidates.store, found)
        with pytest.raises(StoreError, match=r"block 1 has no FP8|does not hold .* as FP8 stores it"):
            write_repository(model.source, model.layout, choice, candidates, output, manifest={})
        assert output.list() == []


def test_a_source_that_has_a_tensor_of_the_name_of_a_quantized_experts_is_refused(tmp_path: Path) -> None:
    source = make_family(tmp_path / "made", "qwen3_5_moe_text")
    tensors = load_file(source / "model.safetensors")
    taken = "model.layers.0.mlp.experts.3.up_proj.weight_scale"
    save_file(tensors | {taken: torch.ones(1)}, source / "model.safetensors", {"format": "pt"})
    model = make_model_from(source, tmp_path)
    with pytest.raises(InputError, match=rf"has a tensor {taken}, a name the quantized weight needs"):
        model.write(tmp_path / "out", uniform(model.layout, FormatName.FP8))
    assert list((tmp_path / "out").iterdir()) == []
    model.write(tmp_path / "out", uniform(model.layout, FormatName.BF16))
    assert raw(tensors_of(tmp_path / "out")[taken]) == raw(torch.ones(1))


def test_a_damaged_candidate_file_is_named(model: Model, tmp_path: Path) -> None:
    artifact = model.candidates.artifacts[0, FormatName.NVFP4]
    data = model.candidates.store.get(artifact.key)
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="is missing"):
        CandidateFile(store, artifact)
    for damaged in (data[:-1], b"\xff" * len(data)):
        store.put(artifact.key, damaged)
        with pytest.raises(StoreError, match=artifact.key):
            CandidateFile(store, artifact)
    store.put(artifact.key, data[:-1] + bytes([data[-1] ^ 1]))
    file = CandidateFile(store, artifact)
    with pytest.raises(StoreError, match="another digest"):
        file.check()
    store.put(artifact.key, data)
    file.check()
    assert all(tensor.nbytes == file.tensors[name].nbytes for name, tensor in file.read(file.tensors).items())


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].codec is not None])
@pytest.mark.parametrize("shape", [(8, 32), (24, 160), (128, 512)])
def test_shipped_tensors_are_what_the_codec_packs(name: FormatName, shape: tuple[int, int], model: Model) -> None:
    codec = FORMATS[name].codec
    assert codec is not None
    if codec.refusal(*shape) is not None:
        shape = 200, 256
    packed = codec.pack(nearest(torch.randn(shape), codec, codec.global_scale(4.0)))
    expected = shipped(name, LinearSpec(name="a", out_features=shape[0], in_features=shape[1], sources=("a.weight",)))
    scalars = {"input_global_scale"} if FORMATS[name].static_input_scale else set()
    assert expected.keys() == packed.keys() | scalars
    for suffix, tensor in packed.items():
        assert expected[suffix][1] == tuple(tensor.shape)
    assert shipped(FormatName.BF16, LinearSpec(name="a", out_features=8, in_features=8, sources=("a.weight",))) == {}


class Failing(Store):
    """A store that fails at the nth put or write."""

    def __init__(self, path: Path, calls: int) -> None:
        super().__init__(path)
        self.calls = calls

    def put(self, key: str, data: Any) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise StoreError("no space")
        super().put(key, data)


@pytest.mark.parametrize("calls", range(9))
def test_a_model_can_be_read_only_after_the_last_write(calls: int, model: Model, tmp_path: Path) -> None:
    choice = uniform(model.layout, FormatName.FP8)
    store = Failing(tmp_path, calls)
    try:
        write_repository(model.source, model.layout, choice, model.candidates, store, manifest={})
    except StoreError:
        assert not (tmp_path / "config.json").exists()
        with pytest.raises(InputError):
            Checkpoint(Store(tmp_path))
    else:
        assert calls == 8
    # What is left is marked as ours, so the next attempt may take its place.
    if calls:
        model.write(tmp_path, choice)
        assert model.verify(tmp_path, choice).ok


def test_a_failure_inside_a_shard_leaves_no_part_of_it(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Store.get_ranges

    def failing(store: Store, key: str, ranges: Any) -> Any:
        if len(ranges) > 1:  # headers are read one range at a time, tensors many
            raise StoreError("connection lost")
        return read(store, key, ranges)

    choice = mixed(model.layout)
    model.stored(choice)
    with pytest.raises(StoreError, match="connection lost"), staged_directory(tmp_path / "out") as staging:
        monkeypatch.setattr(Store, "get_ranges", failing)
        try:
            model.write(staging, choice)
        finally:
            assert [path.name for path in staging.iterdir()] == [MANIFEST]
    assert list(tmp_path.iterdir()) == []


def test_a_prefix_that_holds_something_else_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds something else \(thesis.txt\)"):
        model.write(tmp_path, uniform(model.layout, FormatName.FP8))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_smaller_repository_leaves_no_shard_of_the_one_before(model: Model, tmp_path: Path) -> None:
    model.write(tmp_path, uniform(model.layout, FormatName.BF16), shard=20_000)
    (tmp_path / "report.html").write_text("x")
    choice = uniform(model.layout, FormatName.NVFP4)
    repository = model.write(tmp_path, choice)
    assert {path.name for path in tmp_path.iterdir()} == repository.files.keys() | {"report.html"}
    assert model.verify(tmp_path, choice).ok


# Publishing a directory -----------------------------------------------------------------------------------------


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def ours(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / MANIFEST).write_text(content)
    return path


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged_directory(output) as staging:
        assert staging.parent == output.parent
        (staging / MANIFEST).write_text("new")
        assert not output.exists()
    assert (output / MANIFEST).read_text() == "new"
    assert names(output.parent) == {"out"}


@pytest.mark.parametrize("link", [False, True])
def test_ours_is_replaced_as_a_whole(link: bool, tmp_path: Path) -> None:
    output = ours(tmp_path / "real" / "out", "old")
    (output / "model-00001-of-00009.safetensors").write_text("old")
    target = tmp_path / "link" if link else output
    if link:
        target.symlink_to(output)
    with staged_directory(target) as staging:
        (staging / MANIFEST).write_text("new")
        assert names(output) == {MANIFEST, "model-00001-of-00009.safetensors"}
    assert names(output) == {MANIFEST}
    assert (target / MANIFEST).read_text() == "new"
    assert names(tmp_path / "real") == {"out"}


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_the_old_output_and_nothing_else(exists: bool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if exists:
        ours(output, "old")
    with pytest.raises(ValueError, match="stop"), staged_directory(output) as staging:
        (staging / MANIFEST).write_text("new")
        raise ValueError("stop")
    assert names(tmp_path) == ({"out"} if exists else set())
    if exists:
        assert (output / MANIFEST).read_text() == "old"


def test_foreign_places_are_refused_at_entry(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, message in (("thesis", "holds something else"), ("file", "not a dir"), ("dangling", "not a dir")):
        with pytest.raises(InputError, match=message):
            check_output(tmp_path / name)
        with pytest.raises(InputError, match=message), staged_directory(tmp_path / name):
            raise AssertionError("entered")
    assert names(tmp_path) == {"thesis", "file", "dangling"}
    with pytest.raises(InputError, match="mount point"):
        check_output(Path("/proc"))
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(tmp_path / "not there")


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(InputError, match="holds something else"), staged_directory(output) as staging:
        (staging / MANIFEST).write_text("new")
        output.mkdir()
        (output / "thesis.txt").write_text("x")
    assert names(tmp_path) == {"out"}
    assert names(output) == {"thesis.txt"}


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out") as staging:
        (staging / MANIFEST).write_text("new")
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {MANIFEST}


def test_leftovers_of_killed_runs_are_removed_and_only_those(tmp_path: Path) -> None:
    dead = {".out.writing-0123456789ab", ".out.replaced-0123456789ab"}
    kept = {".out.writing-0123", ".other.writing-0123456789ab", "out.writing-0123456789ab", ".out.writing-0123456789AB"}
    for name in dead | kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    ours(tmp_path / "out", "old")
    with staged_directory(tmp_path / "out") as staging:
        (staging / MANIFEST).write_text("new")
        assert names(tmp_path) == kept | {"out", staging.name}
    assert names(tmp_path) == kept | {"out"}


def test_the_staging_directory_of_a_living_run_is_left_alone(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out") as first:
        (first / MANIFEST).write_text("first")
        with staged_directory(tmp_path / "out") as second:
            (second / MANIFEST).write_text("second")
        assert first.is_dir()
    assert (tmp_path / "out" / MANIFEST).read_text() == "first"
    assert names(tmp_path) == {"out"}


def test_a_run_killed_between_its_renames_has_its_old_output_put_back(tmp_path: Path) -> None:
    ours(tmp_path / ".out.replaced-0123456789ab", "old")
    with pytest.raises(ValueError, match="stop"), staged_directory(tmp_path / "out"):
        raise ValueError("stop")
    assert (tmp_path / "out" / MANIFEST).read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_a_rename_that_fails_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = ours(tmp_path / "out", "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if ".writing-" in path.name:
            raise OSError("disk")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk"), staged_directory(output) as staging:
        (staging / MANIFEST).write_text("new")
    assert (output / MANIFEST).read_text() == "old"
    assert names(tmp_path) == {"out"}
