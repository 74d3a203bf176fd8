"""The config group of each module, under vLLM's rules and under compressed-tensors' (used by transformers).

vLLM's rules are reimplemented from its `compressed_tensors/utils.py` (0.32); for compressed-tensors its own functions
are called. If a module has several names in the runtimes (`Layout.aliases_of`), every rule is applied to each of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from torch import nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.layout import FusedGroup, Layout
from prismaquant_ray.repository.quantization_config import (
    KV_CACHE_SCHEME,
    Choice,
    build_quantization_config,
    common_format,
    config_group,
)

#: last part of a fused module's name → last parts of its members' names
FusedMapping = Mapping[str, Sequence[str]]
NO_FUSED: FusedMapping = {}


def fused_mapping(layout: Layout) -> dict[str, tuple[str, ...]]:
    """vLLM's `packed_modules_mapping`, from the fused groups of a layout."""
    return {
        group.name.rpartition(".")[2]: tuple(linear.name.rpartition(".")[2] for linear in group.linears)
        for group in layout.groups
        if len(group.linears) > 1 and group.experts is None
    }


def experts_route(config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Config group that vLLM gives a layer's experts, from the names of expert 0's Linears.

    Raises:
        InputError: vLLM refuses, because the projections have different schemes.
    """
    names = list(names)
    found = {vllm_route(config, name, class_name="") for name in names}
    if len(found) > 1:
        layer = names[0].rpartition(".")[0].rpartition(".")[0]
        raise InputError(f"projections of {layer} get {_listed(found)}; vLLM needs one scheme for all of a layer's")
    return found.pop()


def vllm_route(
    config: Mapping[str, Any], name: str, *, fused: FusedMapping = NO_FUSED, class_name: str = "ColumnParallelLinear"
) -> str | None:
    """Config group that vLLM gives the module `name` (fused or not), or None when it stays unquantized.

    `class_name` is vLLM's class for it.

    Raises:
        InputError: vLLM refuses, or would use one member's scheme for all.
    """
    shards = _shards(name, fused)
    if _vllm_ignored(config, name, shards):
        return None
    group_of = _group_of(config)
    target = _first(name, group_of)
    if target is None and shards:
        found = [_first(shard, group_of) for shard in shards]
        routed = {group_of[target] if target is not None else None for target in found}
        if len(routed) > 1:
            raise InputError(f"members of {name} get {_listed(routed)}; vLLM needs one scheme for all of them")
        target = found[0]
    if target is None:
        target = next((target for target in group_of if _matches_class(class_name, target)), None)
    return group_of[target] if target is not None else None


def transformers_route(config: Mapping[str, Any], name: str, module: nn.Module | None = None) -> str | None:
    """Config group that compressed-tensors gives a module (by default a Linear), or None."""
    module = module if module is not None else _linear()
    group_of = _group_of(config)
    if not is_match(name, module, list(group_of), config.get("ignore") or ()):
        return None
    return group_of[match_targets(name, module, list(group_of))[0]]


def named_groups(config: Mapping[str, Any], name: str) -> set[str]:
    """All config groups with a target that matches this name; more than one is a conflict."""
    return {
        group
        for group, entry in config["config_groups"].items()
        if any(_matches(name, target) for target in entry["targets"])
    }


def is_ignored(config: Mapping[str, Any], name: str) -> bool:
    """Whether `ignore` matches a module; both runtimes use the same rule."""
    return _first(name, config.get("ignore") or ()) is not None


def unreadable_because(config: Any) -> str | None:
    """Why a configuration cannot be read by compressed-tensors or has an invalid pattern; None if it is readable."""
    try:
        QuantizationConfig.model_validate(config)
        targets = [target for entry in config["config_groups"].values() for target in entry["targets"]]
        for pattern in [*targets, *(config.get("ignore") or ())]:
            re.compile(pattern.removeprefix("re:"))
    # compressed-tensors' validators have no exception class of their own.
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, re.error) as error:
        return " ".join(str(error).split())[:200]
    return None


def config_problems(config: Any, *, cache: bool = False) -> Iterator[str]:
    """Problems of a configuration that do not depend on the model; `cache` says whether it has an FP8 KV cache."""
    unreadable = unreadable_because(config)
    if unreadable is None and not isinstance(config.get("ignore"), list):
        unreadable = "it has no list to ignore"
    if unreadable is not None:
        yield f"quantization_config cannot be read: {unreadable}"
        return
    groups: Mapping[str, Any] = config["config_groups"]
    if config.get("quant_method") != "compressed-tensors":
        yield "quantization_config: quant_method is not compressed-tensors"
    if config.get("quantization_status") != "compressed":
        yield "quantization_config: quantization_status is not compressed; transformers would compute NaN"
    scheme = config.get("kv_cache_scheme")
    if cache and scheme != KV_CACHE_SCHEME:
        yield "quantization_config: kv_cache_scheme is not that of an FP8 cache; its scales would not be used"
    if not cache and scheme is not None:
        yield "quantization_config: kv_cache_scheme asks for scales that the repository does not hold"
    formats = {entry.get("format") for entry in groups.values()}
    if None in formats:
        yield "quantization_config: a config group has no format of its own; vLLM would not know FP8"
    elif config.get("format") != common_format(formats):
        yield f"quantization_config: format {config.get('format')} is not that of its groups"


def route_problems(config: Mapping[str, Any], layout: Layout, choice: Choice, modules: Iterable[str]) -> Iterator[str]:
    """Modules that do not get the chosen scheme in both runtimes; `modules` lists all modules of the model."""
    fused = fused_mapping(layout)
    for group in layout.groups:
        schemes = {linear.name: config_group(choice[group.name], linear) for linear in group.linears}
        for route, name in _vllm_routes(config, layout, group, fused):
            if isinstance(route, InputError):
                yield str(route)
            else:
                yield from _wrong(config, "vLLM", name, route, schemes[group.linears[0].name])
        for linear in group.linears:
            for name in dict.fromkeys([linear.names[0], linear.names[-1]]):
                for alias in layout.aliases_of(name):
                    route = transformers_route(config, alias)
                    yield from _wrong(config, "transformers", alias, route, schemes[linear.name])
    for ignored in layout.ignored:
        for name in layout.aliases_of(ignored):
            yield from _wrong(config, "vLLM", name, vllm_route(config, name), None)
            yield from _wrong(config, "transformers", name, transformers_route(config, name), None)
    linears = dict.fromkeys(layout.ignored, False)  # name → quantized
    for group in layout.groups:
        quantized = FORMATS[choice[group.name]].codec is not None
        linears |= {name: quantized for linear in group.linears for name in linear.names}
    for name in dict.fromkeys([*linears, *modules]):
        for alias in layout.aliases_of(name):
            yield from _named(config, alias, linears.get(name))


def unroutable_because(layout: Layout, formats: Sequence[FormatName]) -> str | None:
    """Why a plan with everything quantized would not reach every Linear in both runtimes; None if it would.

    One block of each structure is asked.
    """
    few = replace(layout, blocks=layout.structures)
    quantized = [name for name in formats if FORMATS[name].codec is not None]
    choice = {group.name: next(iter(formats_of(group, quantized)), FormatName.BF16) for group in few.groups}
    config = build_quantization_config(few, choice)
    if config is None:
        return None
    return next(iter([*config_problems(config), *route_problems(config, few, choice, ())]), None)


def _vllm_routes(
    config: Mapping[str, Any], layout: Layout, group: FusedGroup, fused: FusedMapping
) -> Iterator[tuple[str | InputError | None, str]]:
    """The config group that vLLM gives a group under each of its names, or its refusal."""
    names = [group.name] if group.experts is None else [linear.names[0] for linear in group.linears]
    for aliases in layout.spelled(names):
        try:
            if group.experts is None:
                yield vllm_route(config, aliases[0], fused=fused), aliases[0]
            else:
                yield experts_route(config, aliases), aliases[0]
        except InputError as error:
            yield error, aliases[0]


def _named(config: Mapping[str, Any], name: str, quantized: bool | None) -> Iterator[str]:
    """Problems of the patterns that match a name; `quantized` is None for a module that is not a Linear."""
    found = named_groups(config, name)
    if len(found) > 1:
        yield f"{name} is a target of {', '.join(sorted(found))}; vLLM and transformers choose differently"
    if found and not quantized:
        yield f"{name} is not to be quantized, but a target of {min(found)}"
    if not found and quantized:
        yield f"{name} is no target by name; class names reach other modules too"
    if quantized is False and not is_ignored(config, name):
        yield f"{name} is not quantized and not in `ignore`"


def _wrong(
    config: Mapping[str, Any], runtime: str, name: str, route: str | None, scheme: Mapping[str, Any] | None
) -> Iterator[str]:
    entry = config["config_groups"][route] if route else None
    if (entry and {key: value for key, value in entry.items() if key != "targets"}) != scheme:
        got, intended = (
            (f"{route} ({entry['format']})" if entry else "nothing"),
            scheme["format"] if scheme else "nothing",
        )
        yield f"{name} gets {got} from {runtime}; {intended} is intended"


def _group_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Target → group in file order. Both runtimes keep a dict: a repeated target gets the last group."""
    return {target: group for group, entry in config["config_groups"].items() for target in entry["targets"]}


def _shards(name: str, fused: FusedMapping) -> list[str]:
    parent, dot, leaf = name.rpartition(".")
    return [f"{parent}{dot}{member}" for member in fused.get(leaf, ())]


def _vllm_ignored(config: Mapping[str, Any], name: str, shards: Sequence[str]) -> bool:
    ignore = config.get("ignore") or ()
    if _first(name, ignore) is not None:
        return True
    found = {_first(shard, ignore) is not None for shard in shards}
    if len(found) > 1:
        raise InputError(f"some members of {name} are in `ignore` and some are not; vLLM refuses that")
    return found == {True}


def _first(name: str, targets: Iterable[str]) -> str | None:
    return next((target for target in targets if _matches(name, target)), None)


def _matches(name: str, target: str) -> bool:
    # re.match: anchored at the start only, in both runtimes.
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _matches_class(class_name: str, target: str) -> bool:
    return _matches(class_name, target) if target.startswith("re:") else target.lower() in class_name.lower()


@functools.cache
def _linear() -> nn.Linear:
    return nn.Linear(1, 1, bias=False, device=torch.device("meta"))


def _listed(groups: Iterable[str | None]) -> str:
    return ", ".join(sorted(group or "no group" for group in groups))
