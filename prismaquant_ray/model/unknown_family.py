"""A family for an architecture that has none: what it can be derived from, and what must be assumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.families import Family
from prismaquant_ray.families.base import ATTENTION, GATED_MLP, LATENT, ROUTER
from prismaquant_ray.layout import GENERIC
from prismaquant_ray.model.conversions import Conversions, conversions_of
from prismaquant_ray.model.meta_model import MetaModel
from prismaquant_ray.model.rehearsal import rehearse

# How configurations call the number of a layer's experts.
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
# How models call the module that routes, or weighs a shared expert.
_ROUTERS = frozenset({"router", "gate", "wg", "shared_expert_gate"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Derived:
    """A family; Linears of each decoder layer that stay, by path in it, with the reason; and what is assumed.

    `resident` are the modules that run before and behind the layers, `stored` says where the checkpoint has each
    parameter.
    """

    family: Family
    kept: Sequence[Mapping[str, str]]
    guesses: tuple[str, ...]
    resident: frozenset[str]
    stored: Conversions


def derive(meta_model: MetaModel, architecture: str, names: Iterable[str]) -> Derived:
    """What a rehearsal of the layers shows of an architecture.

    Raises:
        InputError: it has no output head, or cannot be run layer by layer.
    """
    if meta_model.model.get_output_embeddings() is None:
        raise InputError(
            f"{architecture} has no output head, so there is no loss to price by; use a causal language model "
            "(…ForCausalLM)"
        )
    stored = conversions_of(meta_model, names)
    rehearsed, experts = rehearse(meta_model), _expert_count(meta_model.config)
    family = Family(
        name=GENERIC,
        architectures=(),
        blocks=meta_model.blocks_path,
        fused=(ATTENTION, GATED_MLP, *LATENT.fused),
        ignored=LATENT.ignored,
        experts=stored.experts,
    )
    kept = [
        _routers(layer, experts) | dict(found.kept)
        for layer, found in zip(meta_model.layers, rehearsed.layers, strict=True)
    ]
    guesses = (
        f"{architecture} has no family; its decoder is taken to be {meta_model.blocks_path}",
        "q/k/v and gate/up projections are assumed to be fused by the runtime, everything else to stand alone",
        "the runtime is assumed to spell modules as the checkpoint does",
    )
    resident = frozenset({*rehearsed.entry, *rehearsed.exit})
    return Derived(family=family, kept=kept, guesses=guesses, resident=resident, stored=stored)


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
