"""A dequantized repository is the source's, with the weights that the stored codes stand for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from jobs.command_line import cli
from jobs.commands import verify
from prismaquant_ray.compressed.dequantize import QuantizedRepository
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.forward.scale_search import nearest
from prismaquant_ray.repository.manifest import DEQUANTIZED, MANIFEST
from prismaquant_ray.repository.routing import transformers_route
from prismaquant_ray.repository.staging import check_output, staged_output
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.files import INDEX
from prismaquant_ray.storage.store import Store
from tests.repositories import SEVEN, Choice, Model, make_model, mixed, rewrite, tensors_of
from tests.runs import configuration
from tests.s3_server import S3Server
from tests.tiny import random_tokens, read_config
from tests.tiny_families import FAMILIES, VISION_FAMILIES

Change = Callable[[dict[str, Any]], None]
CODED = tuple(name for name in SEVEN if name is not FormatName.BF16)
# gpt_oss keeps its experts; what is said of the others holds of it, too.
QUICK = tuple(name for name in FAMILIES if name not in ("deepseek_v3_fp8", "qwen3_5_text", "qwen3_5_moe_text"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["dequantize", *(str(argument) for argument in arguments)])


def dequantize(repository: Path, output: Path) -> dict[str, Any]:
    result = call(repository, output, "--json")
    assert result.exit_code == 0, result.output
    body: dict[str, Any] = json.loads(result.stdout)
    return body


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def directory(model: Model) -> Path:
    assert model.source.store.path is not None
    return model.source.store.path


def taking_turns(model: Model, formats: tuple[FormatName, ...] = SEVEN) -> Choice:
    """Every fused group one of the formats that it can take, in turn."""
    choice = {}
    for index, group in enumerate(model.layout.groups):
        able = formats_of(group, formats) or (FormatName.BF16,)
        choice[group.name] = able[index % len(able)]
    return choice


def decoded(model: Model, choice: Choice) -> dict[str, Tensor]:
    """Module name → the weight that its codes stand for."""
    found = {}
    for module, (name, tensors) in model.stored(choice).items():
        codec = FORMATS[name].codec
        assert codec is not None
        found[module] = codec.decode(tensors)
    return found


def expected(model: Model, choice: Choice) -> dict[str, Tensor]:
    """The source's tensors, every quantized weight replaced by its decoded one."""
    result = {name: model.source.read([name])[name].clone() for name in model.source.tensors}
    values = decoded(model, choice)
    for group in model.layout.groups:
        for matrix in group.matrices:
            for linear, rows in zip(matrix.linears, matrix.rows, strict=True):
                for index, module in enumerate(linear.names):
                    if module not in values:
                        continue
                    if len(linear.sources) == len(linear.names):
                        result[linear.sources[index]] = values[module]
                    else:
                        result[linear.sources[0]][index, rows] = values[module]
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), "llama_untied", layers=3, shards=2)


@pytest.fixture(scope="module")
def written(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with every format in it."""
    output = tmp_path_factory.mktemp("written") / "repository"
    model.write(output, mixed(model.layout))
    return output


@pytest.fixture
def repository(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    copy = tmp_path / "repository"
    copy.mkdir()
    for file in written.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def configure(repository: Path, change: Change) -> None:
    config = read_config(repository)
    change(config)
    (repository / "config.json").write_text(json.dumps(config))


def module_of(repository: Path, name: FormatName) -> str:
    """A module of that format."""
    modules = QuantizedRepository(Store(repository)).modules
    return next(module.name for module in modules if module.format is name)


# Weights --------------------------------------------------------------------------------------------------------


def test_the_result_is_the_source_with_the_decoded_weights(model: Model, written: Path, tmp_path: Path) -> None:
    body = dequantize(written, tmp_path / "out")
    wanted, found = expected(model, mixed(model.layout)), tensors_of(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name
    assert set(body["modules"]) == set(CODED)
    assert body["bytes_before"] == sum(info.nbytes for info in Checkpoint(Store(written)).stored.values())
    assert body["bytes_after"] == sum(tensor.nbytes for tensor in found.values())
    assert not body["notes"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_its_own_names_and_shapes_back(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, family)
    for formats in (tuple(FormatName), (FormatName.NVFP4,)):
        choice = taking_turns(model, formats)
        model.write(tmp_path / "repository", choice)
        dequantize(tmp_path / "repository", tmp_path / "out")
        wanted, found = expected(model, choice), tensors_of(tmp_path / "out")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert raw(found[name]) == raw(tensor), name


@pytest.mark.parametrize("family", QUICK)
def test_transformers_loads_it_and_computes_what_the_decoded_weights_compute(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, family)
    choice = taking_turns(model)
    model.write(tmp_path / "repository", choice)
    dequantize(tmp_path / "repository", tmp_path / "out")
    auto = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    reference = tmp_path / "reference"
    reference.mkdir()
    for name in model.source.other_files():
        (reference / name).write_bytes((directory(model) / name).read_bytes())
    tensors = {name: tensor.contiguous() for name, tensor in expected(model, choice).items()}
    save_file(tensors, reference / "model.safetensors", {"format": "pt"})
    other = auto.from_pretrained(reference)
    state = other.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(raw(tensor) == raw(state[name]) for name, tensor in loaded.state_dict().items())
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, other.eval()(tokens).logits)


def test_compressed_tensors_decompresses_every_module_to_the_same_weight(written: Path, tmp_path: Path) -> None:
    dequantize(written, tmp_path / "out")
    config = read_config(written)["quantization_config"]
    schemes = QuantizationConfig.model_validate(config).config_groups
    found = tensors_of(tmp_path / "out")
    quantized = QuantizedRepository(Store(written))
    for module in quantized.modules:
        tensors = quantized.source.read([info.name for info in module.tensors.values()])
        own = {name.removeprefix(f"{module.name}."): tensor for name, tensor in tensors.items()}
        scheme = schemes[str(transformers_route(config, module.name))]
        theirs = BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(own, scheme)["weight"]
        assert raw(theirs.to(torch.bfloat16)) == raw(found[f"{module.name}.weight"]), module.name


def test_tensors_of_no_module_pass_through_in_any_dtype(repository: Path, tmp_path: Path) -> None:
    extra = {
        "model.layers.0.linear_attn.A_log": torch.randn(4),
        "model.layers.0.mlp.down_proj.bias": torch.randn(64),
        "vision.table": torch.arange(5),
        "vision.flags": torch.tensor([True, False]),
        "vision.empty": torch.empty(0, 3),
        "vision.scalar": torch.tensor(1.5, dtype=torch.float64),
        "vision.weight": torch.randn(4, 6),
    }
    rewrite(repository, extra)
    dequantize(repository, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    for name, tensor in extra.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(found[name]) == raw(tensor)


def test_shards_are_cut_and_hold_every_tensor_once(written: Path, tmp_path: Path) -> None:
    quantized = QuantizedRepository(Store(written))
    result = quantized.write(Store(tmp_path / "cut"), max_shard_bytes=50_000)
    quantized.write(Store(tmp_path / "whole"))
    cut = Checkpoint(Store(tmp_path / "cut"))
    assert len(cut.files) > 3
    assert list(result.sha256) == list(cut.files)
    for file, digest in result.sha256.items():
        assert hashlib.sha256((tmp_path / "cut" / file).read_bytes()).hexdigest() == digest
        assert result.files[file] == (tmp_path / "cut" / file).stat().st_size
    whole = tensors_of(tmp_path / "whole")
    assert {name: raw(tensor) for name, tensor in tensors_of(tmp_path / "cut").items()} == {
        name: raw(tensor) for name, tensor in whole.items()
    }


# Experts --------------------------------------------------------------------------------------------------------


#: Of architectures for which transformers' own rules are asked.
MODEL_TYPES = {
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
}


def experts_repository(place: Path, *, packed: str | None, architecture: str, drop: str | None = None) -> Path:
    """Two layers of twelve MXFP8 experts; `packed` names a layer that holds BF16 ones, packed."""
    place.mkdir()
    codec = FORMATS[FormatName.MXFP8].codec
    assert codec is not None
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for layer in ("0", "1"):
        stack = f"model.layers.{layer}.mlp.experts"
        for leaf, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
            for expert in range(12):
                packed_weight = codec.pack(nearest(torch.randn(shape, generator=generator), codec, None))
                tensors |= {f"{stack}.{expert}.{leaf}.{key}": value for key, value in packed_weight.items()}
    if packed is not None:
        stack = f"model.layers.{packed}.mlp.experts"
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(stack)}
        tensors[f"{stack}.gate_up_proj"] = torch.randn(12, 64, 64).bfloat16()
        tensors[f"{stack}.down_proj"] = torch.randn(12, 64, 32).bfloat16()
    tensors = {name: tensor for name, tensor in tensors.items() if drop is None or not name.startswith(drop)}
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    weights, activations = FORMATS[FormatName.MXFP8].scheme(64)  # type: ignore[misc]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": "mxfp8-quantized"}
    scheme = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mxfp8-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    body = {"architectures": [architecture], "quantization_config": scheme}
    if architecture in MODEL_TYPES:
        body["model_type"] = MODEL_TYPES[architecture]
    (place / "config.json").write_text(json.dumps(body))
    return place


@pytest.mark.parametrize(
    ("packed", "architecture", "again"),
    [
        (None, "Qwen3MoeForCausalLM", False),
        (None, "Qwen3_5MoeForCausalLM", True),
        # Each matrix of its stacks is transposed.
        (None, "Qwen3VLMoeForConditionalGeneration", True),
        ("1", "Qwen3_5MoeForCausalLM", True),
        ("1", "UnheardOfForCausalLM", True),
    ],
)
def test_experts_are_packed_where_the_model_has_them_packed(
    packed: str | None, architecture: str, again: bool, tmp_path: Path
) -> None:
    repository = experts_repository(tmp_path / "repository", packed=packed, architecture=architecture)
    dequantize(repository, tmp_path / "out")
    stored, found = tensors_of(repository), tensors_of(tmp_path / "out")
    codec = FORMATS[FormatName.MXFP8].codec
    assert codec is not None

    def weight(expert: int, leaf: str) -> Tensor:
        module = f"model.layers.0.mlp.experts.{expert}.{leaf}"
        return codec.decode({key: stored[f"{module}.{key}"] for key in ("weight", "weight_scale")})

    def packed_of(matrices: list[Tensor]) -> Tensor:
        stacked = torch.stack(matrices)
        return stacked.transpose(1, 2).contiguous() if architecture.startswith("Qwen3VL") else stacked

    stack = "model.layers.0.mlp.experts"
    if again:
        assert {name for name in found if name.startswith(stack)} == {f"{stack}.gate_up_proj", f"{stack}.down_proj"}
        gates = [torch.cat([weight(expert, "gate_proj"), weight(expert, "up_proj")]) for expert in range(12)]
        assert raw(found[f"{stack}.gate_up_proj"]) == raw(packed_of(gates))
        assert found[f"{stack}.gate_up_proj"].shape == (12, 64, 64)
        downs = [weight(expert, "down_proj") for expert in range(12)]
        assert raw(found[f"{stack}.down_proj"]) == raw(packed_of(downs))
        assert found[f"{stack}.down_proj"].shape == packed_of(downs).shape
    else:
        assert raw(found[f"{stack}.11.up_proj.weight"]) == raw(weight(11, "up_proj"))
        assert len(found) == 2 * 12 * 3
    if packed:
        for name in ("gate_up_proj", "down_proj"):
            other = f"model.layers.{packed}.mlp.experts.{name}"
            assert raw(found[other]) == raw(stored[other])


def test_a_layer_with_a_missing_expert_is_not_packed(tmp_path: Path) -> None:
    repository = experts_repository(
        tmp_path / "repository", packed=None, architecture="Qwen3_5MoeForCausalLM",
        drop="model.layers.0.mlp.experts.3.up_proj",
    )  # fmt: skip
    dequantize(repository, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in found
    assert "model.layers.1.mlp.experts.gate_up_proj" in found


# Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_everything_else_is_copied_but_for_the_scheme_and_the_manifest(
    nested: bool, repository: Path, tmp_path: Path
) -> None:
    def move(config: dict[str, Any]) -> None:
        config["text_config"] = {"hidden_size": 64}
        if nested:
            config["text_config"]["quantization_config"] = config.pop("quantization_config")

    configure(repository, move)
    before = read_config(repository)
    (repository / "LICENSE").write_bytes(b"\xff\x00licence")
    dequantize(repository, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert "quantization_config" not in json.dumps(config)
    before.pop("quantization_config", None)
    before["text_config"].pop("quantization_config", None)
    assert list(config.items()) == list(before.items())
    others = {file.name for file in repository.iterdir()} - {MANIFEST, INDEX, "config.json"}
    for name in others:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (repository / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (manifest["kind"], manifest["complete"]) == (DEQUANTIZED, True)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir() if file.name != MANIFEST}
    assert manifest["files"] == sizes


def test_it_says_in_a_line_what_it_did(written: Path, tmp_path: Path) -> None:
    result = call(written, tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert "NVFP4A16" in result.stdout
    assert "modules as BF16" in result.stdout


def test_an_earlier_result_is_replaced_and_nothing_else_is(written: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    dequantize(written, output)
    (output / "stray.txt").write_text("of the earlier one")
    dequantize(written, output)
    assert not (output / "stray.txt").exists()
    for other, message in (
        (written, "are one place"),
        (written / "below", "are one place"),
        (written.parent, "are one place"),
        (Path(f"{written}/../{written.name}"), "are one place"),
    ):
        before = digests(written)
        refused(call(written, other), message)
        assert digests(written) == before
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    for file in written.iterdir():
        (quantized / file.name).write_bytes(file.read_bytes())
    refused(call(written, quantized), "holds a quantized repository")
    (quantized / MANIFEST).write_text("{")
    refused(call(written, quantized), "holds a quantized repository")
    (quantized / MANIFEST).unlink()
    refused(call(written, quantized), "holds something else")
    assert (quantized / INDEX).read_bytes() == (written / INDEX).read_bytes()


def test_the_writer_of_quantized_repositories_leaves_a_dequantized_one_alone(
    model: Model, written: Path, tmp_path: Path
) -> None:
    dequantize(written, tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(InputError, match=r"out holds a dequantized repository; choose another output$"):
        model.write(tmp_path / "out", mixed(model.layout))
    with pytest.raises(InputError, match=r"out holds a dequantized repository; choose another output$"):
        check_output(tmp_path / "out")
    assert digests(tmp_path / "out") == before


def test_verify_says_that_a_repository_is_a_dequantized_one(model: Model, written: Path, tmp_path: Path) -> None:
    dequantize(written, tmp_path / "out")
    config = configuration(tmp_path / "job", directory(model), f"store.output={tmp_path / 'out'}")
    with pytest.raises(InputError, match=r"out is a dequantized repository; verify the quantized one$"):
        verify.run(config)
    assert not (tmp_path / "job" / "run").exists()


def test_an_interrupted_write_at_a_prefix_is_taken_up_by_the_next(written: Path, tmp_path: Path) -> None:
    """Where nothing can be renamed: the same store twice, the first time with a name that is gone the second time."""
    output = Store(tmp_path / "out")
    quantized = QuantizedRepository(Store(written))
    first = quantized.write(output, max_shard_bytes=50_000)
    (tmp_path / "out" / "config.json").unlink()
    second = quantized.write(output)
    assert set(output.list()) == {*second.files, MANIFEST}
    assert not first.sha256.keys() & set(output.list())


@pytest.mark.s3
def test_from_store_to_store_it_is_the_same_and_a_failure_leaves_no_model(
    written: Path, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    dequantize(written, tmp_path / "out")
    s3_server.make_bucket("dequantized")
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    source, output = Store("s3://dequantized/quantized"), Store("s3://dequantized/deep/out")
    for file in written.iterdir():
        source.put(file.name, file.read_bytes())
    refused(call(source.uri, f"{source.uri}/"), "are one place")
    for _ in range(2):
        assert call(source.uri, output.uri).exit_code == 0
        assert output.list() == sorted(file.name for file in (tmp_path / "out").iterdir())
        for file in (tmp_path / "out").iterdir():
            assert output.get(file.name) == file.read_bytes(), file.name
    with pytest.raises(ZeroDivisionError), staged_output(output.uri) as store:
        QuantizedRepository(source).write(store)
        raise ZeroDivisionError
    assert not {"config.json", INDEX} & set(output.list())
    assert call(source.uri, output.uri).exit_code == 0
    refused(call(tmp_path / "out", source.uri), "is not quantized")
    source.put(MANIFEST, b"{}")
    refused(call(written, source.uri), "holds a quantized repository")


def digests(place: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in place.iterdir() if file.is_file()}


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


# Other tools ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose rows all have groups of one size."""
    return make_model(tmp_path_factory.mktemp("even"), "llama_untied", intermediate=192)


def foreign(repository: Path, *, name: FormatName, model: Model) -> None:
    """Write a repository of one format with the configuration that llm-compressor writes."""
    model.write(repository, dict.fromkeys((group.name for group in model.layout.groups), name))

    def change(config: dict[str, Any]) -> None:
        own = config["quantization_config"]
        (group,) = own["config_groups"].values()
        group["weights"] |= {"observer": "minmax", "observer_kwargs": {}, "block_structure": None, "actorder": None}
        group["targets"] = ["Linear"]
        del group["format"]
        own["ignore"] = ["lm_head"]

    configure(repository, change)


def test_a_class_name_as_target_and_one_format_for_all_are_read(tmp_path: Path, even: Model) -> None:
    for name in CODED:
        foreign(tmp_path / name, name=name, model=even)
        body = dequantize(tmp_path / name, tmp_path / f"{name}-out")
        assert body["modules"] == {name: 14}


def test_fp8_under_float32_scales_is_read(tmp_path: Path, even: Model) -> None:
    foreign(tmp_path / "fp8", name=FormatName.FP8, model=even)
    codec = FORMATS[FormatName.FP8].codec
    assert codec is not None
    scales = {name: t.float() * 1.001 for name, t in tensors_of(tmp_path / "fp8").items() if name.endswith("_scale")}
    rewrite(tmp_path / "fp8", dict(scales))
    dequantize(tmp_path / "fp8", tmp_path / "out")
    stored, found = tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "out")
    for name, scale in scales.items():
        weight = name.removesuffix("_scale")
        assert raw(found[weight]) == raw((stored[weight].float() * scale).bfloat16())


def test_weights_on_which_runtimes_differ_are_noted(tmp_path: Path, even: Model) -> None:
    foreign(tmp_path / "nvfp4", name=FormatName.NVFP4, model=even)
    q_proj = "model.layers.0.self_attn.q_proj"
    rewrite(tmp_path / "nvfp4", {f"{q_proj}.weight_global_scale": torch.tensor([1000.1])})
    body = dequantize(tmp_path / "nvfp4", tmp_path / "out")
    rough, apart = body["notes"]
    assert rough.startswith(f"{q_proj}: weight_global_scale is not a BF16 value")
    assert apart.startswith(f"{q_proj}: weight_global_scale is not that of what vLLM fuses with it")


# Refusals -------------------------------------------------------------------------------------------------------


def groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    return list(config["quantization_config"]["config_groups"].values())


def no_scheme(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def other_method(config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}


def no_groups(config: dict[str, Any]) -> None:
    del config["quantization_config"]["config_groups"]


def no_targets(config: dict[str, Any]) -> None:
    groups(config)[0]["targets"] = []


def bad_pattern(config: dict[str, Any]) -> None:
    groups(config)[0]["targets"] = ["re:("]


def list_of_groups(config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"] = {"W8A8": ["Linear"]}


def rotated(config: dict[str, Any]) -> None:
    config["quantization_config"]["transform_config"] = {"config_groups": {"R1": {"type": "hadamard"}}}


def cached(config: dict[str, Any]) -> None:
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}


def swapped(config: dict[str, Any]) -> None:
    first, second, *_ = groups(config)
    first["targets"], second["targets"] = second["targets"], first["targets"]


def asymmetric(config: dict[str, Any]) -> None:
    next(group for group in groups(config) if group["format"] == "pack-quantized")["weights"]["symmetric"] = False


def seven_bits(config: dict[str, Any]) -> None:
    next(group for group in groups(config) if group["format"] == "pack-quantized")["weights"]["num_bits"] = 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_scheme, "has no quantization_config"),
        (other_method, "quantization_config is of 'awq'"),
        (no_groups, "quantization_config cannot be read"),
        (no_targets, "but quantization_config has no scheme for it"),
        (bad_pattern, "quantization_config cannot be read"),
        (list_of_groups, "quantization_config cannot be read"),
        (rotated, "has a transform_config"),
        (cached, "has a kv_cache_scheme"),
        (swapped, "which is not"),
        (asymmetric, "int group 64), which is not decoded; known are INT3A16, INT4, INT4A8, MXFP4"),
        (seven_bits, "(pack-quantized 7 int group 64), which is not decoded; known are INT3A16, INT4, INT4A8, MXFP4"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(
    change: Change, message: str, repository: Path, tmp_path: Path
) -> None:
    configure(repository, change)
    refused(call(repository, tmp_path / "out"), message)
    assert {path.name for path in tmp_path.iterdir()} == {"repository"}


@pytest.mark.parametrize(
    ("name", "suffix", "change"),
    [
        (FormatName.NVFP4, "weight_scale", None),
        (FormatName.NVFP4, "weight_packed", None),
        (FormatName.NVFP4, "input_global_scale", None),
        (FormatName.NVFP4A16, "input_global_scale", torch.tensor([1.0])),
        (FormatName.NVFP4, "weight_global_scale", torch.tensor([1.0], dtype=torch.bfloat16)),
        (FormatName.NVFP4, "weight", torch.ones(64, 64)),
        (FormatName.INT4, "weight_zero_point", torch.ones(64, 2, dtype=torch.int32)),
        (FormatName.INT4, "weight_g_idx", torch.arange(64, dtype=torch.int32)),
        (FormatName.INT4, "weight_scale", torch.ones(64, 1, dtype=torch.bfloat16)),
        (FormatName.MXFP8, "weight_scale", torch.ones(64, 2)),
        (FormatName.MXFP8, "weight", torch.zeros(64, 8, 8).to(torch.float8_e4m3fn)),
        (FormatName.MXFP4, "weight_packed", torch.zeros(0, 32, dtype=torch.uint8)),
        (FormatName.FP8, "weight", torch.zeros(64, 64, dtype=torch.int8)),
        (FormatName.FP8, "weight_scale", torch.ones(64)),
        (FormatName.FP8, "input_scale", torch.ones(1)),
    ],
)
def test_tensors_that_do_not_fit_the_scheme_are_refused_by_name(
    name: FormatName, suffix: str, change: Tensor | None, repository: Path, tmp_path: Path
) -> None:
    module = module_of(repository, name)
    rewrite(repository, {f"{module}.{suffix}": change})
    result = call(repository, tmp_path / "out")
    refused(result, f"{module} has the scheme group_")
    assert f"which is not {name}; config.json and the weights do not belong together" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"repository"}


def test_a_weight_that_is_named_but_not_quantized_is_refused_unless_ignored(repository: Path, tmp_path: Path) -> None:
    module = module_of(repository, FormatName.FP8)
    weight = torch.ones(tensors_of(repository)[f"{module}.weight"].shape).bfloat16()
    rewrite(repository, {f"{module}.weight": weight, f"{module}.weight_scale": None})
    refused(call(repository, tmp_path / "out"), f"{module} has the scheme group_")
    configure(repository, lambda config: config["quantization_config"]["ignore"].append(module))
    dequantize(repository, tmp_path / "out")
    assert raw(tensors_of(tmp_path / "out")[f"{module}.weight"]) == raw(weight)


def test_a_pattern_for_whole_layers_does_not_reach_routers_and_norms(repository: Path, tmp_path: Path) -> None:
    router = {"model.layers.0.mlp.gate.weight": torch.ones(4, 64).bfloat16()}
    rewrite(repository, router)

    def widen(config: dict[str, Any]) -> None:
        groups(config)[-1]["targets"].append(r"re:.*\.layers\..*")

    configure(repository, widen)
    dequantize(repository, tmp_path / "out")
    assert "model.layers.0.mlp.gate.weight" in tensors_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "suffix", "value"),
    [
        (FormatName.NVFP4, "weight_global_scale", 0.0),
        (FormatName.NVFP4, "weight_global_scale", float("nan")),
        (FormatName.FP8, "weight_scale", float("inf")),
        (FormatName.MXFP8, "weight_scale", 255),
        (FormatName.MXFP4, "weight_scale", 0),
    ],
)
def test_weights_that_are_no_numbers_are_refused_and_nothing_appears(
    name: FormatName, suffix: str, value: float, repository: Path, tmp_path: Path
) -> None:
    module = module_of(repository, name)
    spoilt = tensors_of(repository)[f"{module}.{suffix}"]
    spoilt.view(-1)[0] = value
    rewrite(repository, {f"{module}.{suffix}": spoilt})
    refused(call(repository, tmp_path / "out"), f"{module} ({name}) decodes to weights that are NaN")
    assert {path.name for path in tmp_path.iterdir()} == {"repository"}


def test_a_scale_of_zero_below_zeros_is_fine(repository: Path, tmp_path: Path) -> None:
    module = module_of(repository, FormatName.MXFP4)
    stored = tensors_of(repository)
    codes, scale = stored[f"{module}.weight_packed"], stored[f"{module}.weight_scale"]
    codes[0, :16], scale[0, 0] = 0, 0
    rewrite(repository, {f"{module}.weight_packed": codes, f"{module}.weight_scale": scale})
    dequantize(repository, tmp_path / "out")
    assert not tensors_of(tmp_path / "out")[f"{module}.weight"][0, :32].any()


def test_a_wrong_shape_of_integers_is_refused_and_nothing_appears(repository: Path, tmp_path: Path) -> None:
    module = module_of(repository, FormatName.INT4)
    rewrite(repository, {f"{module}.weight_shape": torch.tensor([1, 2])})
    refused(call(repository, tmp_path / "out"), f"{module}.weight_shape is [1, 2]")
    assert {path.name for path in tmp_path.iterdir()} == {"repository"}


def test_what_is_no_repository_is_refused(written: Path, model: Model, tmp_path: Path) -> None:
    refused(call(directory(model), tmp_path / "out"), "is not quantized: config.json has no quantization_config")
    refused(call(tmp_path / "nowhere", tmp_path / "out"), "is not a directory")
    (tmp_path / "empty").mkdir()
    refused(call(tmp_path / "empty", tmp_path / "out"), "no config.json")
    refused(call(written, "ftp://x/y"), "ftp:// is not supported")
    (tmp_path / "file").write_text("x")
    refused(call(written, tmp_path / "file"), "is not a directory")
    assert not (tmp_path / "out").exists()


def test_a_cut_repository_is_refused(repository: Path, tmp_path: Path) -> None:
    (shard,) = repository.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(call(repository, tmp_path / "out"), "cut short")
    shard.unlink()
    refused(call(repository, tmp_path / "out"), "fetch it again")


def test_a_full_disk_is_refused_before_anything_is_written(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    refused(call(written, tmp_path / "out"), "not enough disk")
    assert not any(tmp_path.iterdir())
