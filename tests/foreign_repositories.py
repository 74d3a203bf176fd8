"""Repositories as other makers write them: quantized, compressed and saved by compressed-tensors and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prismaquant_ray.compressed.view import RepositoryView
from prismaquant_ray.storage.store import Store
from tests.tiny import make_checkpoint, read_config

# Every input of the tiny models is smaller than this and some exceed half of it.
AMAX = 12.0
INT8 = {"num_bits": 8, "type": "int"}


def scheme(name: str, targets: tuple[str, ...] = ("Linear",), **weights: Any) -> QuantizationScheme:
    """A preset of compressed-tensors, with these weight arguments."""
    found = preset_name_to_scheme(name, list(targets))
    if weights:
        found.weights = QuantizationArgs.model_validate(found.weights.model_dump() | weights)
    return found


#: Every scheme of compressed-tensors that is read, with its name for people.
SCHEMES: dict[str, tuple[QuantizationScheme, str]] = {
    "nvfp4": (scheme("NVFP4"), "NVFP4"),
    "nvfp4a16": (scheme("NVFP4A16"), "NVFP4A16"),
    "mxfp4": (scheme("MXFP4"), "MXFP4"),
    "mxfp8": (scheme("MXFP8"), "MXFP8"),
    "mxfp8a16": (scheme("MXFP8A16"), "W8A16 float group 32"),
    "mxfp6a16": (scheme("MXFP6A16"), "W6A16 float group 32"),
    "fp8 dynamic": (scheme("FP8_DYNAMIC"), "FP8"),
    "fp8 static": (scheme("FP8"), "W8A8 float tensor with static tensor inputs"),
    "fp8 block": (scheme("FP8_BLOCK"), "FP8_BLOCK"),
    "int8": (scheme("W8A8"), "INT8"),
    "int8 asymmetric": (
        QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**INT8, strategy="channel", symmetric=False),
            input_activations=QuantizationArgs(**INT8, strategy="token", dynamic=True, symmetric=False),
        ),
        "W8A8 int channel asymmetric with dynamic token asymmetric inputs",
    ),
    "int8 static asymmetric": (
        QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**INT8, strategy="tensor"),
            input_activations=QuantizationArgs(**INT8, strategy="tensor", symmetric=False),
        ),
        "W8A8 int tensor with static tensor asymmetric inputs",
    ),
    "int4 128": (scheme("W4A16"), "INT4"),
    "int4 32": (scheme("W4A16", group_size=32), "INT4"),
    "int4 16": (scheme("W4A16", group_size=16), "W4A16 int group 16"),
    "int4 channel": (scheme("W4A16", group_size=None, strategy="channel"), "W4A16 int channel"),
    "int3": (scheme("W3A16"), "INT3A16"),
    "int8a16": (scheme("W8A16"), "INT8A16"),
    "int4 fp8": (scheme("W4AFP8"), "W4A8 int group 128 with dynamic float token inputs"),
}


def make_quantizable(directory: Path) -> Path:
    """A checkpoint that every scheme can quantize.

    The attention output has fewer columns than rows, and no width divides 128 but 128 does.
    """
    return make_checkpoint(directory, "llama_untied", hidden=128, intermediate=256, head_dim=32)


def make_compressed(
    source: Path, repository: Path, *schemes: QuantizationScheme, ignore: tuple[str, ...] = ("lm_head",)
) -> Path:
    """Quantize a model to nearest and save it, as llm-compressor does without calibration."""
    model = AutoModelForCausalLM.from_pretrained(source)
    groups = {f"group_{index}": entry for index, entry in enumerate(schemes)}
    config = QuantizationConfig(config_groups=groups, ignore=list(ignore))
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _set_scales(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(repository)
    compressor.update_config(str(repository))
    for file in source.iterdir():
        if file.name.startswith("tokenizer"):
            (repository / file.name).write_bytes(file.read_bytes())
    return repository


def load_decompressed(repository: Path) -> nn.Module:
    """The model that transformers and compressed-tensors load, decompressed; its Linears still round their inputs."""
    model = AutoModelForCausalLM.from_pretrained(repository)
    with torch.no_grad():
        model(torch.tensor([[5]]))  # the first forward pass decompresses
    return model


def stored(repository: Path, module: str) -> dict[str, Tensor]:
    """Tensors of a module by suffix."""
    tensors = load_file(repository / "model.safetensors")
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == module}


def change(repository: Path, tensors: Mapping[str, Tensor | None], weights: Mapping[str, Any] | None = None) -> None:
    """Change, add or (None) remove tensors, and weight arguments of the first group."""
    every = load_file(repository / "model.safetensors") | tensors
    save_file({name: t for name, t in every.items() if t is not None}, repository / "model.safetensors")
    configure(repository, lambda own: first_group(own)["weights"].update(weights or {}))


def configure(repository: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = read_config(repository)
    edit(config["quantization_config"])
    (repository / "config.json").write_text(json.dumps(config))


def first_group(own: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = next(iter(own["config_groups"].values()))
    return group


def view_of(repository: Path) -> RepositoryView:
    return RepositoryView(Store(repository, create=False))


def _set_scales(module: Any) -> None:
    args = module.quantization_scheme.weights
    low, high = _range(module.weight.float(), args)
    divisor = None
    if args.strategy == "tensor_group":
        divisor = generate_gparam(module.weight.float().min(), module.weight.float().max())
        module.weight_global_scale.data = divisor
    scale, zero = calculate_qparams(low, high, args, global_scale=divisor)
    _fill(module, {"weight_scale": scale, "weight_zero_point": zero})
    inputs = module.quantization_scheme.input_activations
    if inputs is None or inputs.dynamic is True:
        return
    if inputs.strategy == "tensor_group":
        module.input_global_scale.data = generate_gparam(torch.tensor(-AMAX), torch.tensor(AMAX))
    else:
        scale, zero = calculate_qparams(torch.tensor(-AMAX / 2), torch.tensor(AMAX), inputs)
        _fill(module, {"input_scale": scale, "input_zero_point": zero})


def _fill(module: Any, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameter = getattr(module, name, None)
        if parameter is not None:
            parameter.data = value.to(parameter.dtype).view(parameter.shape)


def _range(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight under each scale, in the scales' shape."""
    if args.strategy == "tensor":
        low, high = weight.aminmax()
        return low.view(1), high.view(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)
