"""The `quantization_config` of config.json, as read by vLLM and transformers.

The two match names differently: vLLM takes the first target in file order, compressed-tensors the first in sorted
order. They agree because only one group matches a Linear: targets are whole, anchored names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import refusal
from prismaquant_ray.layout import Layout, LinearSpec
from prismaquant_ray.spelling import EXPERT

Choice = Mapping[str, FormatName]


#: vLLM takes 8-bit floats under one scale for all keys and one for all values, and then caches in FP8 by itself.
KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def build_quantization_config(layout: Layout, choice: Choice, *, cache: bool = False) -> dict[str, Any] | None:
    """The configuration for a choice, with an FP8 KV cache if `cache`, or None when nothing is quantized.

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
    if not members and not cache:
        return None
    compressions = {scheme["format"] for scheme in schemes.values()}
    return {
        "quant_method": "compressed-tensors",
        # Without it transformers treats the weights as uncompressed and computes NaN.
        "quantization_status": "compressed",
        "format": common_format(compressions),
        "config_groups": {
            f"group_{index}": {"targets": targets(layout, names), **schemes[key]}
            for index, (key, names) in enumerate(members.items())
        },
        "ignore": targets(layout, ignored),
        "kv_cache_scheme": dict(KV_CACHE_SCHEME) if cache else None,
        "global_compression_ratio": None,
        "version": version("compressed-tensors"),
    }


def common_format(formats: Collection[str]) -> str:
    """The format of a whole configuration, from those of its groups; without any only the cache is quantized."""
    return next(iter(formats)) if len(formats) == 1 else "mixed-precision" if formats else "dense"


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
    prefixes = {block.prefix: block.prefix.rpartition(".")[2] for block in layout.blocks}
    places: dict[tuple[_Place, ...], list[str]] = {}
    alone: dict[str, None] = {}
    for name in names:
        prefix = next((prefix for prefix in _parents(name) if prefix in prefixes), None)
        index = prefixes.get(prefix or "", "")
        aliases = layout.aliases_of(name)
        if index.isdecimal():
            places.setdefault(tuple(dict.fromkeys(_place(alias, index) for alias in aliases)), []).append(index)
        elif EXPERT in name or len(aliases) > 1:
            alone[f"re:^{_alternatives([_escaped(alias) for alias in aliases])}$"] = None
        else:
            alone[name] = None
    patterns = [pattern for spelled, found in places.items() for pattern in _patterns(spelled, found)]
    return [*patterns, *alone]


class _Place(NamedTuple):
    """A module's name before and behind the number of its block."""

    before: str
    behind: str


def _place(name: str, index: str) -> _Place:
    before, found, behind = f".{name}.".partition(f".{index}.")
    assert found, f"{name}: a spelling without the number of its block"
    return _Place(before.strip("."), behind.strip("."))


def _patterns(spelled: Sequence[_Place], indices: list[str]) -> Iterator[str]:
    """Patterns for one place in these blocks, in every spelling of it."""
    by_end: dict[str, list[str]] = {}
    for place in spelled:
        by_end.setdefault(place.behind, []).append(place.before)
    for behind, starts in by_end.items():
        yield f"re:^{_any_of(starts)}\\.{_alternatives(sorted(indices, key=int))}\\.{_escaped(behind)}$"


def _any_of(names: Sequence[str]) -> str:
    """A pattern for any of these dotted names, with the words that all of them end in once."""
    words = [name.split(".") for name in names]
    common: list[str] = []
    while len(words) > 1 and min(map(len, words)) > 1 and len({each[-1] for each in words}) == 1:
        common.insert(0, words[0][-1])
        words = [each[:-1] for each in words]
    return r"\.".join([_alternatives([_escaped(".".join(each)) for each in words]), *map(_escaped, common)])


def _escaped(name: str) -> str:
    return re.escape(name).replace(re.escape(EXPERT), r"\d+")


def _alternatives(patterns: Sequence[str]) -> str:
    return patterns[0] if len(patterns) == 1 else f"({'|'.join(patterns)})"


def _parents(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
