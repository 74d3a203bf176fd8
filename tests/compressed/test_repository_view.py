"""A repository's view is the model that it computes with, whoever made it: weights bit by bit, inputs as rounded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prismaquant_ray.compressed.dequantize import QuantizedRepository
from prismaquant_ray.compressed.view import RepositoryView
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.layout_builder import Scope, build_layout
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.ranges import read_pieces
from prismaquant_ray.storage.store import Store
from tests.foreign_repositories import (
    INT8,
    SCHEMES,
    change,
    configure,
    first_group,
    load_decompressed,
    make_compressed,
    make_quantizable,
    scheme,
    stored,
    view_of,
)
from tests.pieces import bytes_of
from tests.reference.integers import dequantized
from tests.repositories import everything, make_model, mixed
from tests.s3_server import S3Server
from tests.tiny import random_tokens


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quantizable(tmp_path_factory.mktemp("source"))


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def shapes(layout: Layout) -> list[tuple[Any, ...]]:
    return [(block.kind, block.prefix, block.parameters, block.groups) for block in layout.blocks]


@torch.no_grad()
def logits(view: Checkpoint, tokens: Tensor, roundings: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """By ModelRunner, in float32, block by block."""
    runner = ModelRunner(view, dtype=torch.float32, device=torch.device("cpu"))
    inputs = {"input_ids": tokens}
    with runner.entry():
        hidden = runner.embed(inputs)
    for block in runner.layout.blocks:
        module = runner.load_block(block.index)
        for path, linear in module.named_modules():
            rounding = roundings.get(f"{block.prefix}.{path}")
            if rounding is not None and isinstance(linear, nn.Linear):
                linear.register_forward_pre_hook(lambda _, args, rounding=rounding: (rounding(args[0]),))
        hidden = runner.run_block(block.index, module, hidden, inputs)
    with runner.exit():
        return runner.logits(hidden)


@pytest.mark.parametrize("name", SCHEMES)
def test_it_is_the_model_that_compressed_tensors_loads(name: str, source: Path, tmp_path: Path) -> None:
    entry, label = SCHEMES[name]
    view = view_of(make_compressed(source, tmp_path / "repository", entry))
    assert view.formats == {label: 14}
    assert not [note for note in view.caveats if "_scale is not" not in note]
    plain = Checkpoint(Store(source))
    assert {key: (info.dtype, info.shape) for key, info in view.tensors.items()} == {
        key: (info.dtype, info.shape) for key, info in plain.tensors.items()
    }
    assert shapes(build_layout(view)[1]) == shapes(build_layout(plain)[1])
    model = load_decompressed(tmp_path / "repository")
    weights = view.read(view.tensors)
    for key, tensor in weights.items():
        assert raw(tensor) == raw(model.get_parameter(key)), key
    tokens = random_tokens(2, 24)
    roundings = view.roundings()
    assert set(roundings) == (set(view.modules) if entry.input_activations is not None else set())
    theirs = nn.Module.float(model)(tokens).logits  # transformers forbids its own
    ours = logits(view, tokens, dict(roundings))
    if label == "INT8":
        # vLLM, whose rounding is measured, has amax / 127 where compressed-tensors has amax / 127.5.
        assert torch.nn.functional.mse_loss(ours, theirs) < 1e-2 * theirs.var()
    else:
        assert torch.equal(ours, theirs)
    if roundings:
        assert not torch.equal(logits(view, tokens, {}), theirs)


# Integers in words ----------------------------------------------------------------------------------------------


def test_packed_integers_are_read_as_a_string_of_bits(source: Path, tmp_path: Path) -> None:
    """Zero points too, which transformers does not load."""
    for index, (bits, width, entry) in enumerate(
        [
            (4, 128, scheme("W4A16_ASYM")),
            (4, 32, scheme("W4A16_ASYM", group_size=32)),
            (3, 64, scheme("W4A16_ASYM", group_size=64, num_bits=3)),
            (5, 0, scheme("W4A16_ASYM", group_size=None, strategy="channel", num_bits=5)),
        ]
    ):
        repository = make_compressed(source, tmp_path / str(index), entry)
        view = view_of(repository)
        name = "model.layers.1.self_attn.k_proj"
        tensors = stored(repository, name)
        assert "weight_zero_point" in tensors
        columns = view.tensors[f"{name}.weight"].shape[1]
        groups = [column // (width or columns) for column in range(columns)]
        assert raw(view.read([f"{name}.weight"])[f"{name}.weight"]) == raw(dequantized(tensors, bits, groups))


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_have_the_groups_of_g_idx(symmetric: bool, source: Path, tmp_path: Path) -> None:
    repository = make_compressed(source, tmp_path / "r", scheme("W4A16", group_size=32, symmetric=symmetric))
    name = "model.layers.0.mlp.down_proj"
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)) // 32
    change(repository, {f"{name}.weight_g_idx": order.int()}, {"actorder": "group"})
    view = view_of(repository)
    weight = view.read([f"{name}.weight"])[f"{name}.weight"]
    assert raw(weight) == raw(dequantized(stored(repository, name), 4, order.tolist()))
    other = f"{name.replace('0', '1')}.weight"
    assert raw(view.read([other])[other]) == raw(
        dequantized(stored(repository, other.removesuffix(".weight")), 4, (torch.arange(256) // 32).tolist())
    )
    # -1 says that there is no order.
    change(repository, {f"{name}.weight_g_idx": torch.full((256,), -1, dtype=torch.int32)})
    assert raw(view_of(repository).read([f"{name}.weight"])[f"{name}.weight"]) == raw(
        dequantized(stored(repository, name), 4, (torch.arange(256) // 32).tolist())
    )
    change(repository, {f"{name}.weight_g_idx": torch.zeros(256, dtype=torch.int32)})
    with pytest.raises(InputError, match=rf"{name}.weight_g_idx does not put 32 of 256 columns into each group"):
        view_of(repository).read([f"{name}.weight"])


# Repositories ---------------------------------------------------------------------------------------------------


def test_several_groups_and_the_output_head(source: Path, tmp_path: Path) -> None:
    entries = (
        scheme("NVFP4", (r"re:.*self_attn\..*_proj$",)),
        scheme("W8A8", (r"re:.*down_proj$",)),
        scheme("FP8_DYNAMIC", ("lm_head",)),
    )
    repository = make_compressed(source, tmp_path / "repository", *entries, ignore=())
    view = view_of(repository)
    assert view.formats == {"NVFP4": 8, "INT8": 2, "FP8": 1}
    assert "lm_head" in view.roundings()
    model = load_decompressed(repository)
    for key, tensor in view.read(view.tensors).items():
        assert raw(tensor) == raw(model.get_parameter(key)), key
    for scope in (Scope(), Scope(head=True)):
        assert shapes(build_layout(view, scope)[1]) == shapes(build_layout(Checkpoint(Store(source)), scope)[1])


def test_what_is_not_quantized_is_the_repositorys_own(source: Path, tmp_path: Path) -> None:
    repository = make_compressed(source, tmp_path / "repository", scheme("W4A16"))
    norm = "model.layers.0.input_layernorm.weight"
    changed = torch.full_like(stored(repository, "model.layers.0.input_layernorm")["weight"], 3.0)
    change(repository, {norm: changed, "model.layers.0.mlp.down_proj.bias": torch.ones(128)})
    view = view_of(repository)
    assert raw(view.read([norm])[norm]) == raw(changed)
    assert view.read(["model.layers.0.mlp.down_proj.bias"])
    assert "model.layers.0.mlp.down_proj" in view.modules


def piece_bytes(view: RepositoryView, name: str) -> bytes:
    ((_, data),) = read_pieces([view.piece(name)])
    return bytes(memoryview(data))


def test_a_repository_that_is_not_quantized_is_itself(source: Path) -> None:
    view, plain = view_of(source), Checkpoint(Store(source))
    assert (view.tensors, view.config, view.fingerprint()) == (plain.tensors, plain.config, plain.fingerprint())
    assert (view.modules, view.formats, view.roundings(), view.caveats) == ({}, {}, {}, ())
    tokens = random_tokens(2, 8)
    assert torch.equal(logits(view, tokens, {}), logits(plain, tokens, {}))
    for name, tensor in view.read(view.tensors).items():
        assert raw(tensor) == raw(plain.read([name])[name])
        assert bytes_of(view, name) == raw(tensor)
    sizes = view.sizes()
    assert (sizes.linear_bytes, sizes.linear_parameters) == (0, 0)
    assert 2 * sizes.parameters == sizes.tensor_bytes
    assert sizes.file_bytes == sum(file.stat().st_size for file in source.iterdir())


@pytest.mark.parametrize("family", ["qwen3_5_moe", "mixtral", "deepseek_v3_fp8", "qwen3_moe", "gpt_oss"])
def test_repositories_of_ours_decode_as_dequantize_decodes_them(family: str, tmp_path: Path) -> None:
    """Experts that the source has packed, and a source of FP8 in blocks, among them."""
    model = make_model(tmp_path, family)
    for number, choice in enumerate((mixed(model.layout), mixed(model.layout, (FormatName.NVFP4,)))):
        repository = tmp_path / f"repository{number}"
        report = model.write(repository, choice)
        view = view_of(repository)
        scope = everything(model.source, family)
        assert shapes(build_layout(view, scope)[1]) == shapes(build_layout(model.source, scope)[1])
        QuantizedRepository(Store(repository)).write(Store(tmp_path / f"copy{number}"))
        copy = Checkpoint(Store(tmp_path / f"copy{number}"))
        assert {name: (info.dtype, info.shape) for name, info in view.tensors.items()} == {
            name: (info.dtype, info.shape) for name, info in copy.tensors.items()
        }
        weights = copy.read(copy.tensors)
        for name, tensor in view.read(view.tensors).items():
            assert raw(tensor) == raw(weights[name]), name
        expected = {
            name: str(choice[group.name])
            for group in model.layout.groups
            for linear in group.linears
            for name in linear.names
            if FORMATS[choice[group.name]].codec is not None
        }
        assert view.formats == Counter(expected.values())
        assert view.modules.keys() == expected.keys()
        rounding = {name for name, label in expected.items() if FORMATS[FormatName(label)].round_activation}
        assert view.roundings().keys() == rounding
        assert not view.caveats
        counted = sum(view.linear_bytes(linear) for linear in model.layout.linears())
        assert 8 * counted / model.layout.parameters == pytest.approx(report.bpp, rel=1e-12)
        sizes = view.sizes()
        assert sizes.parameters == sum(math.prod(info.shape) for info in model.source.tensors.values())
        assert 8 * sizes.tensor_bytes / sizes.parameters == pytest.approx(report.bits_all_parameters, rel=1e-12)


def test_experts_are_read_in_any_number_and_order(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3_5_moe")
    model.write(tmp_path / "repository", mixed(model.layout))
    view = view_of(tmp_path / "repository")
    whole = view.read(view.tensors)
    names = [*reversed(view.tensors)]
    packed = [name for name in names if name.endswith("experts.gate_up_proj")]
    for some in ([names[0]], names[::3], [packed[0], names[1]], []):
        assert {name: raw(tensor) for name, tensor in view.read(some).items()} == {
            name: raw(whole[name]) for name in some
        }
    assert {name: bytes_of(view, name) for name in view.tensors} == {name: raw(whole[name]) for name in whole}
    with pytest.raises(InputError, match="tensor nothing is missing"):
        view.read(["nothing"])


def test_float16_stays_float16_and_float32_scales_give_bfloat16(source: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    for dtype, kept in ((torch.float16, torch.float16), (torch.float32, torch.bfloat16)):
        repository = make_compressed(source, tmp_path / str(dtype), scheme("W8A8"))
        tensors = stored(repository, name)
        scale = (tensors["weight_scale"].float() * 1.001).to(dtype)
        change(repository, {f"{name}.weight_scale": scale})
        weight = view_of(repository).read([f"{name}.weight"])[f"{name}.weight"]
        assert weight.dtype == kept
        assert raw(weight) == raw((tensors["weight"].float() * scale.float()).to(kept))


@pytest.mark.s3
def test_a_remote_repository_is_read_like_a_local_one(
    source: Path, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = (scheme("NVFP4", (r"re:.*self_attn\..*",)), scheme("FP8", (r"re:.*mlp\..*",)))
    repository = make_compressed(source, tmp_path / "repository", *entries)
    local = view_of(repository)
    s3_server.make_bucket("views")
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = Store("s3://views/quantized")
    for file in repository.iterdir():
        store.put(file.name, file.read_bytes())
    remote = RepositoryView(Store(store.uri, create=False))
    weights = local.read(local.tensors)
    assert {name: raw(tensor) for name, tensor in remote.read(remote.tensors).items()} == {
        name: raw(tensor) for name, tensor in weights.items()
    }
    roundings = local.roundings()
    x = torch.randn(3, 128)
    assert remote.roundings().keys() == roundings.keys()
    for name, rounding in remote.roundings().items():
        y = x.repeat(1, 2) if name.endswith("down_proj") else x
        assert torch.equal(rounding(y), roundings[name](y))
    assert (remote.formats, remote.sizes()) == (local.formats, local.sizes())
    assert remote.fingerprint() == local.fingerprint()


# Refusals -------------------------------------------------------------------------------------------------------


def test_a_cache_in_eight_bits_is_noted_and_its_scales_are_no_tensors(source: Path, tmp_path: Path) -> None:
    repository = make_compressed(source, tmp_path / "repository", scheme("FP8"))
    extra = {f"model.layers.0.self_attn.{part}_scale": torch.ones(1) for part in "kv"}
    extra["model.layers.1.self_attn.k_proj.output_scale"] = torch.ones(1)
    change(repository, extra)
    configure(repository, lambda own: own.update(kv_cache_scheme={"num_bits": 8, "type": "float"}))
    view = view_of(repository)
    assert view.caveats[0] == "the keys and values of the cache are not rounded (kv_cache_scheme)"
    assert view.tensors.keys() == Checkpoint(Store(source)).tensors.keys()
    assert not build_layout(view)[1].guesses
    with pytest.raises(InputError, match="kv_cache_scheme, which BF16 weights cannot express"):
        QuantizedRepository(Store(repository))


def test_what_is_not_followed_is_noted(source: Path, tmp_path: Path) -> None:
    repository = make_compressed(source, tmp_path / "repository", scheme("W8A8"))
    attention = {"targets": ["LlamaAttention"], "input_activations": {**INT8, "strategy": "tensor"}}

    def edit(own: dict[str, Any]) -> None:
        first_group(own)["output_activations"] = {**INT8, "strategy": "tensor"}
        first_group(own)["input_activations"] = {**INT8, "strategy": "tensor", "dynamic": True}
        own["config_groups"]["group_1"] = attention

    configure(repository, edit)
    view = view_of(repository)
    assert [note.split(";")[0] for note in view.caveats] == [
        "outputs are not rounded (group_0 has output_activations)",
        "group_0 has one activation scale for all tokens that run together, here those of a microbatch",
        "group_1 (LlamaAttention) quantizes no weights and is not applied",
    ]
    assert view.formats == {"W8A8 int channel with dynamic tensor inputs": 14}


def test_scales_that_vllm_does_not_apply_as_they_are_stored_are_noted(source: Path, tmp_path: Path) -> None:
    q_proj, k_proj, v_proj = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    nvfp4 = make_compressed(source, tmp_path / "nvfp4", scheme("NVFP4"))
    names = [name for name in load_file(nvfp4 / "model.safetensors") if name.endswith(".weight_global_scale")]
    change(nvfp4, {name: torch.tensor([512.0]) for name in names})
    assert view_of(nvfp4).caveats == ()
    change(nvfp4, {f"{k_proj}.input_global_scale": torch.tensor([7.0])})
    assert view_of(nvfp4).caveats == (
        f"{q_proj}: input_global_scale is not that of what vLLM fuses with it; vLLM applies the largest to all",
    )
    change(nvfp4, {f"{v_proj}.weight_global_scale": torch.tensor([1000.1])})
    rough, apart, _ = view_of(nvfp4).caveats
    assert rough.startswith(f"{v_proj}: weight_global_scale is not a BF16 value")
    assert apart.startswith(f"{q_proj}: weight_global_scale is not that of what vLLM fuses with it")
    (note,) = view_of(make_compressed(source, tmp_path / "fp8", scheme("FP8"))).caveats
    assert note.endswith("vLLM rounds these weights again, under the largest")
    assert ": weight_scale is not that of what vLLM fuses with it" in note


def test_the_dialects_of_older_writers_are_read(source: Path, tmp_path: Path) -> None:
    repository = make_compressed(source, tmp_path / "repository", scheme("W8A8"))
    view = view_of(repository)
    weights = view.read(view.tensors)
    zeros = {
        f"{name}.weight_zero_point": torch.zeros(module.rows, 1, dtype=torch.int8)
        for name, module in view.modules.items()
    }
    change(repository, zeros)

    def edit(own: dict[str, Any]) -> None:
        group = first_group(own)
        del group["format"]
        every = {"actorder": None, "block_structure": None, "group_size": None, "observer_kwargs": {}}
        group["weights"] |= {**every, "observer": "minmax"}
        group["input_activations"] |= {**every, "observer": None}
        group["output_activations"] = None
        own.pop("version", None)
        own.pop("transform_config", None)
        own |= {
            "format": "int-quantized",
            "global_compression_ratio": 1.5,
            "kv_cache_scheme": None,
            "quantization_status": "frozen",
            "sparsity_config": {"format": "dense", "global_sparsity": 0.1, "sparsity_structure": "unstructured"},
        }

    configure(repository, edit)
    for formats in ("int-quantized", "naive-quantized", "mixed-precision"):
        configure(repository, lambda own, formats=formats: own.update(format=formats))
        old = view_of(repository)
        # Zero points, which are all zero, are not our format's.
        assert (old.formats, view.formats) == ({"W8A8 int channel with dynamic token inputs": 14}, {"INT8": 14})
        assert old.caveats == view.caveats
        assert all(raw(tensor) == raw(weights[name]) for name, tensor in old.read(old.tensors).items())


@pytest.mark.parametrize("name", [FormatName.MXFP4, FormatName.MXFP8])
def test_mx_needs_not_be_said_of_scales(name: FormatName, source: Path, tmp_path: Path) -> None:
    repository = make_compressed(source, tmp_path / "repository", scheme(name))

    def edit(own: dict[str, Any]) -> None:
        for part in ("weights", "input_activations"):
            for key in ("scale_dtype", "zp_dtype"):
                first_group(own)[part].pop(key, None)

    configure(repository, edit)
    view = view_of(repository)
    assert view.formats == {name: 14}
    x = torch.randn(3, 128)
    round_activation = FORMATS[name].round_activation
    assert round_activation is not None
    for module, rounding in view.roundings().items():
        if not module.endswith("down_proj"):
            assert torch.equal(rounding(x), round_activation(x, None))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}), "has a transform_conf"),
        (lambda s: s.update(sparsity_config={"format": "sparse-24-bitmask"}), "has a sparsity_config"),
        (lambda s: s.update(quant_method="gptq"), "is of 'gptq'; only compressed-tensors is decoded"),
        (lambda s: first_group(s).update(format="marlin-24"), r"down_proj has the scheme group_0 \(marlin-24 8 int"),
        (lambda s: first_group(s).update(format="dense"), r"\(dense 8 int channel\), which is not decoded: the format"),
        (lambda s: first_group(s)["weights"].update(strategy="tensor"), "which is not what that stores"),
        (lambda s: first_group(s)["weights"].update(type="float"), "which is not what that stores"),
        (lambda s: first_group(s)["weights"].update(symmetric=False), "which is not what that stores"),
        (lambda s: first_group(s).update(targets=["Conv2d"]), "has no scheme for it"),
        (lambda s: first_group(s).update(format="pack-quantized"), "which is not what that stores"),
        (
            lambda s: first_group(s).update(input_activations={**INT8, "strategy": "tensor", "dynamic": False}),
            r"\(int-quantized 8 int channel\), whose inputs cannot be rounded: there is no input_scale",
        ),
        (
            lambda s: first_group(s)["input_activations"].update(strategy="group", group_size=48),
            "whose inputs cannot be rounded: activations in groups of 48, of which 256 is no multiple",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_module_and_scheme(
    spoil: Callable[[dict[str, Any]], None], message: str, source: Path, tmp_path: Path
) -> None:
    repository = make_compressed(source, tmp_path / "repository", scheme("W8A8"))
    view_of(repository)
    configure(repository, spoil)
    with pytest.raises(InputError, match=message) as error:
        view_of(repository)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "suffix", "value"),
    [
        ("W4A16", "weight_scale", None),
        ("W4A16", "weight_shape", None),
        ("W4A16_ASYM", "weight_zero_point", None),
        ("W4A16_ASYM", "weight_zero_point", torch.zeros(128, 1, dtype=torch.int8)),
        ("W4A16_ASYM", "weight_g_idx", torch.zeros(64, dtype=torch.int32)),
        ("W8A8", "weight_scale", torch.ones(128)),
        ("W8A8", "weight_g_idx", torch.zeros(128, dtype=torch.int32)),
        ("W8A8", "weight_packed", torch.zeros(128, 128, dtype=torch.int8)),
        ("FP8", "input_scale", None),
        ("FP8", "input_scale", torch.ones(2)),
        ("FP8_BLOCK", "weight_scale", torch.ones(1, 2)),
        ("NVFP4", "weight_global_scale", None),
        ("NVFP4", "input_global_scale", None),
        ("MXFP8", "weight_scale", torch.ones(128, 4)),
    ],
)
def test_tensors_that_are_not_those_of_the_scheme_are_refused_before_they_are_read(
    entry: str, suffix: str, value: Tensor | None, source: Path, tmp_path: Path
) -> None:
    repository = make_compressed(source, tmp_path / "repository", scheme(entry))
    name = "model.layers.1.self_attn.q_proj"
    change(repository, {f"{name}.{suffix}": value})
    with pytest.raises(InputError, match=rf"{name} has the scheme group_0"):
        view_of(repository)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(value: float, source: Path, tmp_path: Path) -> None:
    repository = make_compressed(source, tmp_path / "repository", scheme("FP8"))
    name = "model.layers.1.self_attn.q_proj"
    change(repository, {f"{name}.input_scale": torch.tensor([value])})
    with pytest.raises(InputError, match=rf"{name}.input_scale is"):
        _ = view_of(repository).roundings()[name]
    change(repository, {f"{name}.weight_scale": torch.tensor([float("inf")]).bfloat16()})
    with pytest.raises(InputError, match=rf"{name} \(float-quantized 8 float tensor\) decodes to weights that are NaN"):
        view_of(repository).read([f"{name}.weight"])


def test_patterns_for_one_runtime_alone_are_followed(tmp_path: Path) -> None:
    """Where names in the checkpoint are not vLLM's, some makers write vLLM's."""
    model = make_model(tmp_path, "qwen3_5")
    model.write(tmp_path / "repository", mixed(model.layout, (FormatName.FP8,)))

    def rename(own: dict[str, Any]) -> None:
        group = first_group(own)
        text = json.dumps(group["targets"]).replace(
            json.dumps(r"(model\.language_model|language_model\.model|model)")[1:-1],
            json.dumps(r"language_model\.model")[1:-1],
        )
        group["targets"] = json.loads(text)
        assert not any("model\\.language_model|" in target for target in group["targets"])

    configure(tmp_path / "repository", rename)
    view = view_of(tmp_path / "repository")
    assert "model.language_model.layers.0.mlp.down_proj" in view.modules
