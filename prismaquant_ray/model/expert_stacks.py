"""Whether checkpoints of an architecture have a layer's experts in one tensor, by its class and how that is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismaquant_ray.errors import InputError
from prismaquant_ray.model.conversions import merges_experts, swaps_rows
from prismaquant_ray.model.on_meta import build_on_meta, configured


@dataclass(frozen=True, slots=True)
class ExpertStacks:
    """Stacks (experts, rows, columns), of transposed matrices where `transposed`."""

    transposed: bool


def expert_stacks(config: Mapping[str, Any]) -> ExpertStacks | None:
    """The only form in which transformers reads the experts of a config.json; None where it reads them one by one.

    None, too, for an architecture that it does not know.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    architectures = config.get("architectures") or []
    try:
        model = build_on_meta(configured(config, "config.json"), str(next(iter(architectures), "")))
    except InputError:
        return None
    if not any(name.endswith(".experts.gate_up_proj") for name, _ in model.named_parameters()):
        return None
    converters = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightConverter)]
    of_experts = [each for each in converters if any("experts" in pattern for pattern in each.source_patterns)]
    if any(merges_experts(each.operations) for each in of_experts):
        return None
    return ExpertStacks(transposed=any(swaps_rows(each.operations) for each in of_experts))
