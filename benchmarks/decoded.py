"""What a runtime would compute with: fused groups of a repository, decoded by compressed-tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from prismaquant_ray import FormatName
from prismaquant_ray.layout import FusedGroup
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store

#: The weight (O, I) of one matrix, by module name, and its input scale.
WeightOf = Callable[[str], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Decoded:
    """One fused group in one format: float32 weights and input scales by parameter of the block's module."""

    format: FormatName
    weights: dict[str, Tensor]
    scales: dict[str, Tensor | None]


def decoded(repository: Path, groups: Sequence[FusedGroup]) -> dict[str, Decoded]:
    """Every quantized group of a repository, by what its config.json says."""
    checkpoint = Checkpoint(Store(repository))
    choice = json.loads((repository / "prismaquant.json").read_text())["choice"]
    schemes = [
        (re.compile(target.removeprefix("re:") if target.startswith("re:") else re.escape(target)), group)
        for group in checkpoint.config["quantization_config"]["config_groups"].values()
        for target in group["targets"]
    ]
    members: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        members.setdefault(name.rpartition(".")[0], []).append(name)

    def weight_of(module: str) -> tuple[Tensor, Tensor | None]:
        (scheme,) = [group for pattern, group in schemes if pattern.fullmatch(module)]
        tensors = {name.rpartition(".")[2]: t for name, t in checkpoint.read(members[module]).items()}
        return decode(tensors, module, scheme)

    return {
        group.name: decoded_group(group, FormatName(choice[group.name]), weight_of)
        for group in groups
        if choice[group.name] != FormatName.BF16
    }


def decode(tensors: dict[str, Tensor], module: str, scheme: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """One matrix in float32 of the BF16 that the runtime sees, and its input scale."""
    scale = tensors.pop("input_global_scale", None)
    full = QuantizationScheme(
        targets=[module], weights=scheme["weights"], input_activations=scheme["input_activations"]
    )
    compressor = BaseCompressor.get_value_from_registry(scheme["format"])
    return compressor.decompress(tensors, full)["weight"].to(torch.bfloat16).float(), scale


def decoded_group(group: FusedGroup, name: FormatName, weight_of: WeightOf) -> Decoded:
    """A group's parameters from its matrices' weights: one Linear each, or the experts' stacked and packed."""
    weights: dict[str, Tensor] = {}
    scales: dict[str, Tensor | None] = {}
    for matrix in group.matrices:
        if matrix.experts is None:
            for linear, parameter in zip(matrix.linears, matrix.parameters, strict=True):
                weights[parameter], scales[parameter] = weight_of(linear.name)
            continue
        (parameter,) = matrix.parameters
        each = [[weight_of(linear.names[expert]) for linear in matrix.linears] for expert in range(matrix.experts)]
        weights[parameter] = torch.stack([torch.cat([weight for weight, _ in row]) for row in each])
        found = {None if scale is None else float(scale) for row in each for _, scale in row}
        assert len(found) == 1, "the runtime applies one input scale to all experts"
        scales[parameter] = each[0][0][1]
    return Decoded(name, weights, scales)
