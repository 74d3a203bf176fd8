"""The `quantization_config` of config.json, as read by vLLM and transformers.

The two match names differently: vLLM takes the first target in file order, compressed-tensors the first in sorted
order. They agree because only one group matches a Linear: targets are whole, anchored names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import refusal
from prismaquant_ray.layout import EXPERT, Layout, LinearSpec

Choice = Mapping[str, FormatName]


def build_quantization_config(layout: Layout, choice: Choice) -> dict[str, Any] | None:
    """The configuration for a choice, or None when nothing is quantized.

    Raises:
        InputError: the choice does not fit the layout.
    """
    check_choice(layout, choice)
    members: dict[str, list[str]] = {}
    schemes: dict[str, dict[str, Any]] = {}
    ignored = list(layout.ignored)
    for name, linears in linears_by_format(layout, choice).items():
        for linear in linears:
            scheme = config_group(name, linear)
            if scheme is None:
                ignored.append(linear.name)
                continue
            # INT4 has one scheme per group size, so Linears are grouped by scheme, not by format.
            key = json.dumps(scheme)
            schemes[key] = scheme
            members.setdefault(key, []).append(linear.name)
    if not members:
        return None
    compressions = {scheme["format"] for scheme in schemes.values()}
    return {
        "quant_method": "compressed-tensors",
        # Without it transformers treats the weights as uncompressed and computes NaN.
        "quantization_status": "compressed",
        "format": compressions.pop() if len(compressions) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{index}": {"targets": targets(layout, names), **schemes[key]}
            for index, (key, names) in enumerate(members.items())
        },
        "ignore": targets(layout, ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": version("compressed-tensors"),
    }


def check_choice(layout: Layout, choice: Choice) -> None:
    """Check that every fused group has a format that all its members can take.

    Raises:
        InputError: it does not, or the choice names an unknown group.
    """
    for group in layout.groups:
        if group.name not in choice:
            raise InputError(f"the plan has no format for {group.name}; was it made for another model?")
        reason = refusal(choice[group.name], group)
        if reason is not None:
            raise InputError(f"{group.name} cannot be {choice[group.name]}: {reason}")
    extra = choice.keys() - layout.block_of.keys()
    if extra:
        raise InputError(f"the plan names {min(extra)}, which the model does not have; was it made for another one?")


def linears_by_format(layout: Layout, choice: Choice) -> dict[FormatName, list[LinearSpec]]:
    """Linears by format, in layout order; formats in registry order."""
    found: dict[FormatName, list[LinearSpec]] = {name: [] for name in FORMATS}
    for group in layout.groups:
        found[choice[group.name]].extend(group.linears)
    return found


def config_group(name: FormatName, linear: LinearSpec) -> dict[str, Any] | None:
    """A config group without its targets, or None for BF16."""
    spec = FORMATS[name]
    if spec.scheme is None:
        return None
    weights, input_activations = spec.scheme(linear.in_features)
    return {
        "weights": weights,
        "input_activations": input_activations,
        "output_activations": None,
        # vLLM recognises FP8 and INT4 by the format of their group.
        "format": spec.compression,
    }


def targets(layout: Layout, names: Iterable[str]) -> list[str]:
    """Patterns that match exactly these modules: one per place in a block, and full names outside blocks.

    `re:^model\\.layers\\.(0|3|17)\\.mlp\\.down_proj$`. Both ends are anchored because the runtimes use `re.match`:
    without `^` a pattern would also match a draft head's layers, without `$` a longer sibling. A module with different
    names in the runtimes is matched under each of them; `{}` in a name stands for any expert.
    """
    prefixes = {block.prefix: block.prefix.rpartition(".") for block in layout.blocks}
    places: dict[tuple[str, str], list[str]] = {}
    alone: list[str] = []
    for name in names:
        prefix = next((prefix for prefix in _parents(name) if prefix in prefixes), None)
        stem, _, index = prefixes.get(prefix or "", ("", "", ""))
        if prefix is None or not index.isdecimal():
            exact = EXPERT not in name and len(layout.aliases_of(name)) == 1
            alone.append(name if exact else f"re:^{_spelled(layout, name)}$")
        else:
            places.setdefault((stem, name.removeprefix(f"{prefix}.")), []).append(index)
    patterns = [
        f"re:^{_spelled(layout, stem)}\\.{_any(found)}\\.{_spelled(layout, leaf)}$"
        for (stem, leaf), found in places.items()
    ]
    return [*patterns, *dict.fromkeys(alone)]


def _spelled(layout: Layout, name: str) -> str:
    """A pattern for a dotted name, or part of one, under all its names in the runtimes."""
    alias = next((alias for alias in layout.aliases if alias.part_of(name)), None)
    if alias is None:
        return re.escape(name).replace(re.escape(EXPERT), r"\d+")
    before, _, after = f".{name}.".partition(f".{alias.part}.")
    spelled = f"({'|'.join(re.escape(other) for other in alias.names)})"
    return r"\.".join(
        [
            *([_spelled(layout, before.strip("."))] if before else []),
            spelled,
            *([_spelled(layout, after.strip("."))] if after else []),
        ]
    )


def _parents(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))


def _any(indices: list[str]) -> str:
    return indices[0] if len(indices) == 1 else f"({'|'.join(sorted(indices, key=int))})"
