"""Reading a compressed-tensors configuration: which modules of a repository are quantized, and in which format.

What a module is says its config group, found by vLLM's rules, and its tensors must be those of that format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressed_tensors.quantization import QuantizationArgs

from prismaquant_ray.checkpoint.block_fp8 import KEY
from prismaquant_ray.checkpoint.candidates import INPUT_SCALE, shipped
from prismaquant_ray.checkpoint.header import TensorInfo
from prismaquant_ray.checkpoint.reader import Checkpoint
from prismaquant_ray.checkpoint.routing import is_ignored, unreadable_because, vllm_route
from prismaquant_ray.checkpoint.verify import WEIGHT_SCALE
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, Codec, FormatName
from prismaquant_ray.formats.int4 import WIDTHS
from prismaquant_ray.layout import LinearSpec

# A tensor of such a name makes its module a quantized one.
_MARKS = frozenset(
    ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale")
) | {WEIGHT_SCALE, INPUT_SCALE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A quantized Linear: its format, its tensors by suffix, and its shape."""

    name: str
    format: FormatName
    tensors: Mapping[str, TensorInfo]
    rows: int
    columns: int

    @property
    def codec(self) -> Codec:
        """What decodes it."""
        codec = FORMATS[self.format].codec
        assert codec is not None
        return codec


# Configuration ------------------------------------------------------------------------------------------------------


def _scheme(source: Checkpoint) -> dict[str, Any]:
    """The quantization_config; InputError when there is none or it alone shows that it cannot be decoded."""
    uri, config = source.store.uri, source.source_config
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    scheme: Any = next((part[KEY] for part in parts if part.get(KEY)), None)
    if scheme is None:
        raise InputError(f"{uri} is not quantized: config.json has no {KEY}")
    method = scheme.get("quant_method") if isinstance(scheme, dict) else None
    if method != "compressed-tensors":
        raise InputError(f"{uri}: {KEY} is of {method!r}; only compressed-tensors is decoded")
    unreadable = unreadable_because(scheme)
    if unreadable is not None:
        raise InputError(f"{uri}: {KEY} cannot be read ({unreadable})")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = scheme.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise InputError(f"{uri}: {KEY} has a {key}, which BF16 weights cannot express")
    # A group's own format, where it has one, is the one that counts.
    groups = {
        name: {"format": scheme.get("format")} | _stated(group) for name, group in scheme["config_groups"].items()
    }
    return {**scheme, "config_groups": groups}


def _stated(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if value is not None}


def without_scheme(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model, not quantized."""
    kept = {key: value for key, value in config.items() if key != KEY}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in kept["text_config"].items() if key != KEY}
    return kept


def _format_of(group: Mapping[str, Any]) -> FormatName | None:
    """The format of a group's weights. How it rounds activations only tells NVFP4 from NVFP4A16."""
    if "weights" not in group:
        return None
    weights = QuantizationArgs.model_validate(group["weights"])
    found: dict[bool, FormatName] = {}
    for name, spec in FORMATS.items():
        if spec.scheme is None or spec.compression != group["format"]:
            continue
        arguments, activations = spec.scheme(WIDTHS[0])
        if name is FormatName.INT4 and weights.group_size in WIDTHS:
            arguments["group_size"] = weights.group_size  # the widest is our choice, not the format's
        if _stored_as(QuantizationArgs.model_validate(arguments)) == _stored_as(weights):
            found.setdefault(activations is not None, name)
    return found.get("input_activations" in group, next(iter(found.values()), None))


def _stored_as(args: QuantizationArgs) -> tuple[Any, ...]:
    """What of quantization arguments decides how weights are stored."""
    return args.num_bits, args.type, args.strategy, args.group_size, args.symmetric, args.dynamic


def _described(group: Mapping[str, Any]) -> str:
    weights = group.get("weights", {})
    facts = [group["format"], *(weights.get(key) for key in ("num_bits", "type", "strategy", "group_size"))]
    return " ".join(str(fact) for fact in facts if fact is not None)


# Modules ------------------------------------------------------------------------------------------------------------


def modules_of(source: Checkpoint) -> tuple[Module, ...]:
    """Every quantized module, in the repository's order. InputError for one that cannot be decoded."""
    uri, scheme = source.store.uri, _scheme(source)
    groups = scheme["config_groups"]
    formats = {name: _format_of(group) for name, group in groups.items()}
    by_module: dict[str, dict[str, TensorInfo]] = {}
    for info in source.stored.values():
        parent, _, suffix = info.name.rpartition(".")
        by_module.setdefault(parent, {})[suffix] = info
    found = []
    for name, tensors in by_module.items():
        weight = tensors.get("weight")
        coded = not tensors.keys().isdisjoint(_MARKS) or (weight is not None and weight.dtype.startswith("F8"))
        if not coded and not (weight is not None and len(weight.shape) == 2 and _is_named(scheme, name)):
            continue
        route = vllm_route(scheme, name)
        if route is None:
            raise InputError(
                f"{uri}: {name} holds {_listed(tensors)}, but {KEY} has no scheme for it; "
                "config.json and the weights do not belong together"
            )
        format_name = formats[route]
        if format_name is None:
            known = ", ".join(known for known, spec in FORMATS.items() if spec.codec is not None)
            raise InputError(
                f"{uri}: {name} has the scheme {route} ({_described(groups[route])}), which is not decoded; known are "
                f"{known}"
            )
        own = {suffix: info for suffix, info in tensors.items() if suffix != "bias"}
        module = _module(name, format_name, own, groups[route])
        if module is None:
            raise InputError(
                f"{uri}: {name} has the scheme {route} ({_described(groups[route])}), but holds {_listed(own)}, which "
                f"is not {format_name}; config.json and the weights do not belong together"
            )
        found.append(module)
    return tuple(found)


def _is_named(scheme: Mapping[str, Any], module: str) -> bool:
    """Whether a target spells a module's last word: a pattern for whole layers reaches routers and norms, too."""
    word = re.compile(rf"(?<!\w){re.escape(module.rpartition('.')[2])}(?!\w)")
    return not is_ignored(scheme, module) and any(
        word.search(target) and (re.match(target[3:], module) if target.startswith("re:") else target == module)
        for group in scheme["config_groups"].values()
        for target in group["targets"]
    )


def _module(
    name: str, format_name: FormatName, tensors: Mapping[str, TensorInfo], group: Mapping[str, Any]
) -> Module | None:
    """The module if its tensors are those of its format."""
    spec = FORMATS[format_name]
    assert spec.codec is not None
    codes = tensors.get(spec.codec.codes)
    if codes is None or len(codes.shape) != 2 or codes.nbytes == 0:
        return None
    rows = codes.shape[0]
    columns = codes.nbytes * 8 // spec.codec.code_bits // rows
    if spec.refusal(rows, columns) is not None:
        return None
    expected = dict(shipped(format_name, LinearSpec(name=name, out_features=rows, in_features=columns, sources=())))
    if format_name is FormatName.INT4:
        width = group["weights"]["group_size"]
        expected["weight_scale"] = ("BF16", (rows, columns // width if columns % width == 0 else 0))
    scale = tensors.get("weight_scale")
    if format_name is FormatName.FP8 and scale is not None and scale.dtype == "F32":
        expected["weight_scale"] = ("F32", (rows, 1))  # the runtime holds them in float32
    if {suffix: (info.dtype, info.shape) for suffix, info in tensors.items()} != expected:
        return None
    return Module(name=name, format=format_name, tensors=tensors, rows=rows, columns=columns)


def _listed(tensors: Mapping[str, TensorInfo]) -> str:
    return ", ".join(f"{suffix} {info.dtype} {info.shape}" for suffix, info in sorted(tensors.items()))
