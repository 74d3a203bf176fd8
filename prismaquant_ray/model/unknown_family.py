"""A family for an architecture that has none: what it can be derived from, and what must be assumed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.families import Family
from prismaquant_ray.families.base import ATTENTION, GATED_MLP, LATENT, ROUTER, FusedRule
from prismaquant_ray.families.serving import ServerNames
from prismaquant_ray.layout import GENERIC
from prismaquant_ray.model.conversions import Conversions, conversions_of
from prismaquant_ray.model.meta_model import MetaModel
from prismaquant_ray.model.rehearsal import Found, RehearsedLayer, rehearse
from prismaquant_ray.source.header import TensorInfo
from prismaquant_ray.spelling import Renames, Spelling

# How configurations call the number of a layer's experts.
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
# How models call the module that routes, or weighs a shared expert.
_ROUTERS = frozenset({"router", "gate", "wg", "shared_expert_gate"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Derived:
    """A family; what was found of each decoder layer's Linears; what is known and what is assumed.

    `resident` are the modules that run before and behind the layers, `stored` says where the checkpoint has each
    parameter.
    """

    family: Family
    layers: tuple[Found, ...]
    facts: tuple[str, ...]
    guesses: tuple[str, ...]
    resident: frozenset[str]
    stored: Conversions


def derive(
    meta_model: MetaModel, architecture: str, tensors: Mapping[str, TensorInfo], serving: ServerNames | None
) -> Derived:
    """What a rehearsal of the layers shows of an architecture, and what a server says of it.

    Raises:
        InputError: it has no output head, or cannot be run layer by layer.
    """
    if meta_model.model.get_output_embeddings() is None:
        raise InputError(
            f"{architecture} has no output head, so there is no loss to price by; use a causal language model "
            "(…ForCausalLM)"
        )
    stored = conversions_of(meta_model, tensors)
    rehearsed, experts = rehearse(meta_model), _expert_count(meta_model.config)
    usual = (ATTENTION, GATED_MLP) if serving is None else ()
    fused = [FusedRule(name=name, members=members) for name, members in (serving.fused if serving else {}).items()]
    family = Family(
        name=GENERIC,
        architectures=(),
        blocks=meta_model.blocks_path,
        fused=(*fused, *usual, *LATENT.fused),
        ignored=(*LATENT.ignored, *(serving.kept if serving else ())),
        experts=stored.experts,
        spellings=() if serving is None else _spellings(meta_model, stored, serving, rehearsed.layers),
    )
    layers = tuple(
        replace(each.found, kept=_routers(layer, experts) | dict(each.found.kept))
        for layer, each in zip(meta_model.layers, rehearsed.layers, strict=True)
    )
    facts = [
        f"{architecture} has no family; a rehearsal ran {meta_model.blocks_path} as its decoder",
        "Linears of one module that read one tensor share a format",
    ]
    if meta_model.carried is not None:
        facts.append(f"its layers hand on {meta_model.carried.described}")
    guesses: tuple[str, ...] = ()
    if serving is None:
        guesses = (f"the names of {architecture}'s modules in a server are assumed to be those of the checkpoint",)
    else:
        facts.append(f"names and fused Linears are those of {serving.runtime}")
    resident = frozenset({*rehearsed.entry, *rehearsed.exit})
    return Derived(family=family, layers=layers, facts=tuple(facts), guesses=guesses, resident=resident, stored=stored)


def _spellings(
    meta_model: MetaModel, stored: Conversions, serving: ServerNames, layers: Sequence[RehearsedLayer]
) -> tuple[Spelling, ...]:
    """Names that a server has beside those of its table."""
    through = _through_transformers(meta_model, stored) if serving.through_transformers else ()
    twice = _loaded_twice(meta_model, stored, serving, layers)
    if not twice:
        return through
    return (*through, *(replace(each, regex=(*twice, *each.regex)) for each in (Spelling(), *serving.spellings)))


def _loaded_twice(
    meta_model: MetaModel, stored: Conversions, serving: ServerNames, layers: Sequence[RehearsedLayer]
) -> Renames:
    """Names for the members that a fused Linear lacks: a server loads another one twice (a key that is the value).

    Its quantization asks for all of them by name, so the last one that is there answers for them, too.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for index, layer in enumerate(layers):
        modules = {path for path, _ in meta_model.layers[index].named_modules()}
        for together in layer.found.together:
            parent = together[0][: -len(together[0].rpartition(".")[2])]
            there = {path.rpartition(".")[2] for path in together}
            for members in serving.fused.values():
                held = [member for member in members if member in there]
                if len(held) > 1:
                    for member in members:
                        if f"{parent}{member}" not in modules:
                            path = stored.module(f"{meta_model.blocks_path}.{index}.{parent}{held[-1]}")
                            found.setdefault((held[-1], member), []).append(path.rpartition(".")[0])
    return tuple(
        (rf"^({'|'.join(map(re.escape, parents))})\.{have}\.", rf"\1.{lacking}.")
        for (have, lacking), parents in found.items()
    )


def _through_transformers(meta_model: MetaModel, stored: Conversions) -> tuple[Spelling, ...]:
    """vLLM's names where it runs transformers' own code: the base model is `model`, the output head `lm_head`.

    Source: `_create_hf_to_vllm_mapper` in vLLM's `models/transformers/base.py` (0.32).
    """
    model = meta_model.model
    output = model.get_output_embeddings()
    head = stored.module(next(path for path, module in model.named_modules() if module is output))
    renames = {f"{model.base_model_prefix}.": "model.", f"{head}.": "lm_head."}
    return (Spelling(prefixes=tuple((old, new) for old, new in renames.items() if old not in (new, "."))),)


def _expert_count(config: Any) -> int:
    """How many experts a layer has by its configuration; 0 without any."""
    text = config.get_text_config()
    counts = [getattr(text, name, None) for name in _EXPERTS]
    return next((count for count in counts if isinstance(count, int) and count > 1), 0)


def _routers(layer: nn.Module, experts: int) -> dict[str, str]:
    """Linears that choose or weigh experts, by path: no runtime has a quantized kernel for them."""
    if not experts:
        return {}
    beside = {path.rpartition(".experts")[0] for path, _ in layer.named_modules() if ".experts" in f".{path}"}
    return {
        path: ROUTER
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
        # By its place and the number of its rows, or by its name.
        and (
            (module.out_features in (1, experts) and any(path.startswith(f"{place}.") for place in beside))
            or not _ROUTERS.isdisjoint(path.split("."))
        )
    }
