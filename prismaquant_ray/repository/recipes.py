"""A plan as the input of other quantizers: a recipe of llm-compressor, a configuration of ModelOpt.

Both tools load a model with transformers, so modules have the names that they have there. Only the choice of formats
travels: neither file has a place for equalization factors, searched scales, GPTQ's rounding or prices, so these tools
make other weights of the same formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import yaml
from torch import nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import BlockKind, Layout, LinearSpec
from prismaquant_ray.model.layout_builder import architecture_of, transformers_config
from prismaquant_ray.model.on_meta import build_on_meta
from prismaquant_ray.repository.quantization_config import Choice, check_choice, config_group, targets
from prismaquant_ray.source.protocol import TensorSource

_WEIGHT = ".weight"
_WIDTH = 120


class Tool(StrEnum):
    """A quantizer that takes a plan."""

    LLM_COMPRESSOR = "llm-compressor"
    MODELOPT = "modelopt"


#: The file of each tool, and the version that loaded it.
FILES = {Tool.LLM_COMPRESSOR: "recipe.yaml", Tool.MODELOPT: "modelopt.yaml"}
TRIED = {Tool.LLM_COMPRESSOR: "llm-compressor 0.14.0.1", Tool.MODELOPT: "ModelOpt 0.47.0"}


@dataclass(frozen=True, kw_only=True)
class TransformersPlan:
    """The formats of a plan by transformers' names of modules.

    `quantized` are the Linears with a format other than BF16, in the order of the layout; `linears` the model's other
    Linears, `stacks` its modules that hold experts as one parameter of three dimensions. `absent` are Linears that the
    plan quantizes and transformers does not load: those of a draft head.
    """

    layout: Layout
    quantized: Mapping[str, tuple[FormatName, LinearSpec]]
    linears: tuple[str, ...]
    stacks: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def counts(self) -> dict[FormatName, int]:
        """Linears by format, BF16 last."""
        counts = {name: sum(chosen == name for chosen, _ in self.quantized.values()) for name in FORMATS}
        return {**counts, FormatName.BF16: len(self.linears)}


def transformers_plan(source: TensorSource, layout: Layout, choice: Choice) -> TransformersPlan:
    """A plan by transformers' names.

    Raises:
        InputError: the choice does not fit the layout, or quantizes experts that transformers has as one parameter.
    """
    check_choice(layout, choice)
    quantized: dict[str, tuple[FormatName, LinearSpec]] = {}
    absent: list[str] = []
    stacked: list[str] = []
    for block in layout.blocks:
        for group in block.groups:
            chosen = choice[group.name]
            if FORMATS[chosen].codec is None:
                continue
            if block.kind is BlockKind.DRAFT:
                absent += [linear.name for linear in group.linears]
            elif group.experts is not None:
                stacked.append(f"{group.name} ({chosen})")
            else:
                for matrix in group.matrices:
                    for linear, parameter in zip(matrix.linears, matrix.parameters, strict=True):
                        name = f"{block.prefix}.{parameter}" if block.prefix else parameter
                        quantized[name.removesuffix(_WEIGHT)] = chosen, linear
    if stacked:
        raise InputError(
            f"a recipe cannot quantize {_some(stacked)}: transformers has these experts as one parameter of three "
            "dimensions and no Linear that a pattern could name; keep them in BF16 by allocation.force"
        )
    model = build_on_meta(transformers_config(source), architecture_of(source))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    strange = sorted(quantized.keys() - set(names))
    assert not strange, f"transformers has no Linear {strange[:3]}"
    return TransformersPlan(
        layout=layout,
        quantized=quantized,
        linears=tuple(name for name in names if name not in quantized),
        stacks=tuple(
            name
            for name, module in model.named_modules()
            if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
            and not isinstance(module, nn.Conv1d)
        ),
        absent=tuple(absent),
    )


def recipe_text(tool: Tool, plan: TransformersPlan, title: str) -> str:
    """The file for a tool, YAML; `title` says in its comments which plan it is.

    Raises:
        InputError: the tool does not have a format of the plan.
    """
    body = _llm_compressor(plan) if tool is Tool.LLM_COMPRESSOR else _modelopt(plan)
    comments = [f"{title}, for {TRIED[tool]}.", *_HOW[tool], *_CAVEATS]
    if plan.absent:
        comments.append(f"Not in it, because transformers does not load them: {_some(plan.absent)}.")
    lines = "".join(f"# {line}\n" for line in comments)
    return lines + yaml.safe_dump(body, sort_keys=False, width=_WIDTH, allow_unicode=True)


_HOW = {
    Tool.LLM_COMPRESSOR: (
        "oneshot(model=model, recipe='recipe.yaml', …); NVFP4 needs a dataset, for the inputs' global scales.",
        "GPTQModifier takes the same arguments as QuantizationModifier, and a dataset.",
    ),
    Tool.MODELOPT: (
        "mtq.quantize(model, yaml.safe_load(open('modelopt.yaml')), forward_loop); JSON could not hold the axis -1.",
    ),
}
_CAVEATS = (
    "It is the choice of formats alone. Equalization factors, searched scales, rounding by GPTQ and prices do not",
    "travel: the weights that come out are that tool's own, and the plan's predicted loss is not theirs.",
)


def _llm_compressor(plan: TransformersPlan) -> dict[str, Any]:
    """A recipe with one modifier: a config group for each scheme, as in `quantization_config`."""
    members: dict[str, list[str]] = {}
    schemes: dict[str, dict[str, Any]] = {}
    for name, (chosen, linear) in plan.quantized.items():
        scheme = config_group(chosen, linear)
        assert scheme is not None, chosen
        key = json.dumps(scheme)
        schemes[key] = scheme
        members.setdefault(key, []).append(name)
    # Names are transformers' own: no other runtime's.
    layout = replace(plan.layout, spellings=())
    # The tool takes stacks apart into Linears of these names.
    below = [f"re:^{name.replace('.', '[.]')}[.]" for name in plan.stacks]
    modifier = {
        "config_groups": {
            f"group_{index}": {"targets": targets(layout, names), **schemes[key]}
            for index, (key, names) in enumerate(members.items())
        },
        "ignore": [*targets(layout, plan.linears), *below],
    }
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}


def _modelopt(plan: TransformersPlan) -> dict[str, Any]:
    """A QuantizeConfig: every quantizer off, then those of each Linear by its full name.

    A later entry overrides earlier ones; names are matched with `fnmatch`.
    """
    lacking = [f"{name} ({chosen})" for name, (chosen, _) in plan.quantized.items() if FORMATS[chosen].modelopt is None]
    if lacking:
        raise InputError(f"{TRIED[Tool.MODELOPT]} has no format for {_some(lacking)}; force another one")
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, (chosen, linear) in plan.quantized.items():
        attributes = FORMATS[chosen].modelopt
        assert attributes is not None, chosen
        weight, inputs = attributes(linear.in_features)
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight})
        if inputs is not None:
            entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": inputs})
    return {"quant_cfg": entries, "algorithm": "max"}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
