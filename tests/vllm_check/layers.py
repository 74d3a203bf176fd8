"""What vLLM made of a repository's layers: the scheme each one got, and its weight beside the BF16 copy's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from tests.vllm_check.emulation import format_of

Report = dict[str, Any]


class Files:
    """Tensors of a directory of safetensors, by name; a context."""

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        self._holder: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = self._stack.enter_context(safe_open(path, "pt"))
            self._holder |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._holder)

    def __contains__(self, name: str) -> bool:
        return name in self._holder

    def __getitem__(self, name: str) -> Tensor:
        return self._holder[name].get_tensor(name)


def describe(model: nn.Module, repository: Path, reference: Path | None) -> list[Report]:
    """One entry a Linear, output head or layer of experts of `model`, vLLM's own modules.

    `members` are the checkpoint's modules behind it, `format` the format it is served in. Of a quantized layer,
    `different` counts weights that are not, bit by bit, the reference's; None where there is nothing to compare.
    """
    with Files(repository) as stored, Files(reference or repository) as copy:
        names = _Names(model, [*stored, *copy])
        reports = []
        for path, module in model.named_modules():
            if isinstance(module, RoutedExperts):
                reports.append(_experts(module, path, names, copy if reference else None))
            elif isinstance(module, LinearBase | ParallelLMHead):
                reports.append(_linear(module, path, names, copy if reference else None))
    return reports


def caches(model: nn.Module) -> list[Report]:
    """One entry an attention with a KV cache: its type, and what keys and values are divided by before it."""
    return [
        {"name": path, "type": module.kv_cache_dtype, "scales": [module._k_scale_float, module._v_scale_float]}
        for path, module in model.named_modules()
        if isinstance(module, Attention)
    ]


def is_quantized(repository: Path) -> bool:
    """Whether the configuration declares a quantization."""
    return "quantization_config" in json.loads((repository / "config.json").read_text())


class _Names:
    """vLLM's module names, and the checkpoint's behind them."""

    def __init__(self, model: nn.Module, tensors: list[str]) -> None:
        self.fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        # Of a model that runs transformers' own code the instance has it.
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._checkpoint: dict[str, str] = {}
        for name in tensors:
            mapped = name if mapper is None else mapper.get_rename_mapper().map_name(name)
            if mapped is not None:
                self._checkpoint[mapped.rpartition(".")[0]] = name.rpartition(".")[0]

    def members(self, name: str) -> list[str]:
        """The checkpoint's modules that a Linear of vLLM's unites; empty if it has none of its own."""
        parent, _, leaf = name.rpartition(".")
        parts = [f"{parent}.{part}".removeprefix(".") for part in self.fused.get(leaf, [leaf])]
        return [self._checkpoint[part] for part in parts if part in self._checkpoint]

    def experts(self, layer: RoutedExperts, place: str) -> list[tuple[str, str, str]] | None:
        """Gate, up and down of every expert in order; None if the checkpoint keeps them packed."""
        parts = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        rows = []
        for expert in range(layer.global_num_experts):
            names = [f"{place}.{expert}.{part}" for part in parts]
            if any(name not in self._checkpoint for name in names):
                return None
            rows.append(tuple(self._checkpoint[name] for name in names))
        return rows

    def packed(self, place: str) -> str | None:
        """The checkpoint's module that holds all experts of a layer."""
        return self._checkpoint.get(place)


def _linear(module: nn.Module, path: str, names: _Names, reference: Files | None) -> Report:
    scheme = getattr(module, "scheme", None)
    name = getattr(module, "prefix", None) or path
    # Quantization may know a layer by another name than its weights have.
    members = names.members(name) or names.members(path)
    report = {
        "name": name,
        "members": members,
        "scheme": type(scheme if scheme is not None else module.quant_method).__name__,
        "format": format_of(module.quant_method, scheme),
        "different": None,
    }
    if scheme is not None and reference is not None and members:
        expected = torch.cat([reference[f"{member}.weight"] for member in members])
        # vLLM rounds the number of rows of an output head up.
        report |= _compared(module.stored_weight[: len(expected)], expected)
    return report


def _experts(layer: RoutedExperts, path: str, names: _Names, reference: Files | None) -> Report:
    # Quantization may know a layer by another name than its weights have.
    places = (layer.layer_name, path.rpartition(".")[0])
    rows = next((found for found in (names.experts(layer, place) for place in places) if found is not None), None)
    packed = next((found for found in map(names.packed, places) if found is not None), None)
    report = {
        "name": layer.layer_name,
        "members": [member for row in rows for member in row] if rows else [packed] if packed else [],
        "scheme": f"experts, {getattr(layer, 'stored_format', 'BF16')}",
        "format": getattr(layer, "stored_format", "BF16"),
        "different": None,
    }
    stored = getattr(layer, "stored_weight", None)
    if stored is not None and reference is not None and (rows or packed):
        expected = _expected_experts(rows, packed, reference)
        # Checkpoints of some architectures have each matrix of a stack transposed.
        same = {name: each if each.shape == stored[name].shape else each.mT for name, each in expected.items()}
        report |= _compared(
            torch.cat([stored[matrix].flatten() for matrix in ("w13", "w2")]),
            torch.cat([same[matrix].flatten() for matrix in ("w13", "w2")]),
        )
    return report


def _expected_experts(
    rows: list[tuple[str, str, str]] | None, packed: str | None, reference: Files
) -> dict[str, Tensor]:
    """The copy's experts, which may be packed where the repository's are not."""
    parent = packed or rows[0][0].rsplit(".", 2)[0]
    if f"{parent}.gate_up_proj" in reference:
        return {"w13": reference[f"{parent}.gate_up_proj"], "w2": reference[f"{parent}.down_proj"]}
    matrices = [[reference[f"{member}.weight"] for member in row] for row in rows]
    return {
        "w13": torch.stack([torch.cat([gate, up]) for gate, up, _ in matrices]),
        "w2": torch.stack([down for _, _, down in matrices]),
    }


def _compared(stored: Tensor, expected: Tensor) -> Report:
    if stored.shape != expected.shape:
        return {"different": expected.numel(), "note": f"shapes {tuple(stored.shape)} and {tuple(expected.shape)}"}
    expected = expected.to(torch.bfloat16)
    if stored.ndim == 2 and stored.sum(1).sort().values.equal(expected.sum(1).sort().values):
        # Some models have a loader that sorts rows of queries and keys; if it did so wrongly, logits would differ.
        stored, expected = (each[each.float().sum(1).sort(stable=True).indices] for each in (stored, expected))
    return {
        "different": int((stored != expected).sum()),
        "largest": float((stored.float() - expected.float()).abs().max()),
    }
