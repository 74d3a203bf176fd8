"""Reading a compressed-tensors configuration: which modules of a repository are quantized, and in which format.

A module's format is that of its config group, resolved by vLLM's matching rules; its tensors must be those of that
format.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.families import family_of
from prismaquant_ray.families.serving import server_names
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Codec
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE, INPUT_SCALE, WEIGHT_GLOBAL_SCALE
from prismaquant_ray.forward.candidates import shipped
from prismaquant_ray.layout import LinearSpec, spelled
from prismaquant_ray.repository.routing import is_ignored, unreadable_because, vllm_route
from prismaquant_ray.source.block_fp8 import KEY
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.header import TensorInfo
from prismaquant_ray.spelling import Spelling

# A module with a tensor of one of these names is quantized.
_MARKS = frozenset(
    ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", INPUT_SCALE)
) | {WEIGHT_GLOBAL_SCALE, INPUT_GLOBAL_SCALE}
# A `weight` of one of these dtypes holds codes.
_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32")


# Keys of the configuration that BF16 weights cannot express.
_BEYOND_WEIGHTS = ("kv_cache_scheme", "transform_config", "sparsity_config")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedModule(ABC):
    """A quantized Linear: its config group (with its storage format), its tensors by suffix, and its shape."""

    name: str
    group: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    rows: int
    columns: int

    @property
    @abstractmethod
    def kind(self) -> str:
        """The storage format of its weights, for people."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Dtype of the decoded weight, in safetensors' spelling."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Weight (rows, columns) from its tensors by suffix; scales of activations are not needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Module(QuantizedModule):
    """A module in one of our formats."""

    format: FormatName

    @property
    def codec(self) -> Codec:
        """The codec of its format."""
        codec = FORMATS[self.format].codec
        assert codec is not None
        return codec

    @property
    def kind(self) -> str:
        """The format. Activation rounding only distinguishes NVFP4 from NVFP4A16."""
        return str(self.format)

    @property
    def dtype(self) -> str:
        """Our codecs decode to BF16."""
        return "BF16"

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """By the codec."""
        return self.codec.decode(tensors)


# Configuration ------------------------------------------------------------------------------------------------------


def is_quantized(source: Checkpoint) -> bool:
    """Whether config.json has a quantization_config that `Checkpoint` does not already decode."""
    return any(part.get(KEY) for part in _parts(source.config))


def read_quantization_config(
    source: Checkpoint, *, beyond_weights: tuple[str, ...] = _BEYOND_WEIGHTS
) -> dict[str, Any]:
    """The quantization_config, each group with its storage format, without `actorder`.

    Raises:
        InputError: there is none, it is unreadable, or it has one of the keys `beyond_weights`.
    """
    uri = source.store.uri
    scheme: Any = next((part[KEY] for part in _parts(source.source_config) if part.get(KEY)), None)
    if scheme is None:
        raise InputError(f"{uri} is not quantized: config.json has no {KEY}")
    method = scheme.get("quant_method") if isinstance(scheme, dict) else None
    if method != "compressed-tensors":
        raise InputError(f"{uri}: {KEY} is of {method!r}; only compressed-tensors is decoded")
    scheme = _without_order(scheme)
    unreadable = unreadable_because(scheme)
    if unreadable is not None:
        raise InputError(f"{uri}: {KEY} cannot be read ({unreadable})")
    for key in beyond_weights:
        value = scheme.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise InputError(f"{uri}: {KEY} has a {key}, which BF16 weights cannot express")
    # The format of a group overrides that of the configuration.
    groups = {
        name: {"format": scheme.get("format")} | {key: value for key, value in group.items() if value is not None}
        for name, group in scheme["config_groups"].items()
    }
    return {**scheme, "config_groups": groups}


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]


def _without_order(scheme: dict[str, Any]) -> dict[str, Any]:
    """The scheme without `actorder`: g_idx has the same information, and compressed-tensors rejects `group`."""
    groups = scheme.get("config_groups")
    if not isinstance(groups, dict):
        return scheme
    found = {}
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            group = {**group, "weights": {key: value for key, value in weights.items() if key != "actorder"}}  # noqa: PLW2901
        found[name] = group
    return {**scheme, "config_groups": found}


def unquantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json without its quantization_config."""
    kept = {key: value for key, value in config.items() if key != KEY}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in kept["text_config"].items() if key != KEY}
    return kept


def format_of(group: Mapping[str, Any]) -> FormatName | None:
    """The format of a group's weights. Bits of activations only distinguish formats that store weights alike."""
    if "weights" not in group:
        return None
    weights = QuantizationArgs.model_validate(group["weights"])
    found: dict[int | None, FormatName] = {}
    for name, spec in FORMATS.items():
        if spec.codec is None or spec.scheme is None or spec.compression != group["format"]:
            continue
        arguments, activations = spec.scheme(math.lcm(*spec.codec.widths))
        if weights.group_size in spec.codec.widths:
            arguments["group_size"] = weights.group_size  # any of them is this format; we write one by shape
        if _stored_as(QuantizationArgs.model_validate(arguments)) == _stored_as(weights):
            found.setdefault(activations["num_bits"] if activations else None, name)
    return found.get((group.get("input_activations") or {}).get("num_bits"), next(iter(found.values()), None))


def _stored_as(args: QuantizationArgs) -> tuple[Any, ...]:
    """The quantization arguments that determine how weights are stored."""
    block = tuple(args.block_structure) if args.block_structure else None
    return args.num_bits, args.type, args.strategy, args.group_size, block, args.symmetric, args.dynamic


def describe_weights(group: Mapping[str, Any]) -> str:
    """How a group stores weights, for errors."""
    weights = group.get("weights", {})
    facts = [group["format"], *(weights.get(key) for key in ("num_bits", "type", "strategy", "group_size"))]
    return " ".join(str(fact) for fact in facts if fact is not None)


# Modules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coded:
    """A module whose tensors are codes, with the name and the config group that it is routed to."""

    name: str
    tensors: Mapping[str, TensorInfo]
    route: str
    group: Mapping[str, Any]

    def misfit(self, uri: str, what: str) -> InputError:
        """The error for tensors that do not fit the group."""
        return InputError(
            f"{uri}: {self.name} has the scheme {self.route} ({describe_weights(self.group)}), but holds "
            f"{_listed(self.tensors)}, which is not {what}; config.json and the weights do not belong together"
        )


def coded_modules(source: Checkpoint, scheme: Mapping[str, Any], left_out: Collection[str] = ()) -> Iterator[Coded]:
    """Every module that holds codes, in the repository's order. Tensors in `left_out` belong to no module.

    Raises:
        InputError: no config group matches such a module.
    """
    by_module: dict[str, dict[str, TensorInfo]] = {}
    for info in source.stored.values():
        if info.name not in left_out:
            parent, _, suffix = info.name.rpartition(".")
            by_module.setdefault(parent, {})[suffix] = info
    spellings = _spellings(source)
    for name, tensors in by_module.items():
        weight = tensors.get("weight")
        coded = not tensors.keys().isdisjoint(_MARKS) or (weight is not None and weight.dtype in _CODES)
        if not coded and not (weight is not None and len(weight.shape) == 2 and _is_named(scheme, name)):
            continue
        routes = (vllm_route(scheme, alias) for (alias,) in spelled([name], spellings))
        route = next((route for route in routes if route is not None), None)
        if route is None:
            raise InputError(
                f"{source.store.uri}: {name} holds {_listed(tensors)}, but {KEY} has no scheme for it; "
                "config.json and the weights do not belong together"
            )
        own = {suffix: info for suffix, info in tensors.items() if suffix != "bias"}
        yield Coded(name, own, route, scheme["config_groups"][route])


def modules_of(source: Checkpoint) -> tuple[Module, ...]:
    """Every quantized module, in the repository's order.

    Raises:
        InputError: a module is in none of our formats.
    """
    uri, scheme = source.store.uri, read_quantization_config(source)
    formats = {name: format_of(group) for name, group in scheme["config_groups"].items()}
    found = []
    for coded in coded_modules(source, scheme):
        format_name = formats[coded.route]
        if format_name is None:
            known = ", ".join(known for known, spec in FORMATS.items() if spec.codec is not None)
            raise InputError(
                f"{uri}: {coded.name} has the scheme {coded.route} ({describe_weights(coded.group)}), which is not "
                f"decoded; known are {known}"
            )
        module = module_of(coded, format_name)
        if module is None:
            raise coded.misfit(uri, str(format_name))
        found.append(module)
    return tuple(found)


def _spellings(source: Checkpoint) -> tuple[Spelling, ...]:
    architecture = str(next(iter(source.config.get("architectures") or ()), ""))
    family, serving = family_of(architecture), server_names(architecture)
    return (*(serving.spellings if serving else ()), *(family.spellings if family else ()))


def _is_named(scheme: Mapping[str, Any], module: str) -> bool:
    """Whether a target contains the last part of a module's name; patterns for whole layers also match routers."""
    word = re.compile(rf"(?<!\w){re.escape(module.rpartition('.')[2])}(?!\w)")
    return not is_ignored(scheme, module) and any(
        word.search(target) and (re.match(target[3:], module) if target.startswith("re:") else target == module)
        for group in scheme["config_groups"].values()
        for target in group["targets"]
    )


def module_of(coded: Coded, format_name: FormatName) -> Module | None:
    """The module, or None if its tensors are not those of the format."""
    spec, tensors = FORMATS[format_name], coded.tensors
    assert spec.codec is not None
    codes = tensors.get(spec.codec.codes)
    if codes is None or len(codes.shape) != 2 or codes.nbytes == 0:
        return None
    rows = codes.shape[0]
    columns = codes.nbytes * 8 // spec.codec.code_bits // rows
    if spec.refusal(rows, columns) is not None:
        return None
    linear = LinearSpec(name=coded.name, out_features=rows, in_features=columns, sources=())
    expected = dict(shipped(format_name, linear))
    dtype, (scaled, groups) = expected["weight_scale"]
    if spec.codec.widths:
        width = coded.group["weights"]["group_size"]
        groups = columns // width if columns % width == 0 else 0
    scale = tensors.get("weight_scale")
    if scale is not None and scale.dtype in spec.codec.scales_read:
        dtype = scale.dtype
    expected["weight_scale"] = (dtype, (scaled, groups))
    if {suffix: (info.dtype, info.shape) for suffix, info in tensors.items()} != expected:
        return None
    return Module(name=coded.name, group=coded.group, tensors=tensors, rows=rows, columns=columns, format=format_name)


def _listed(tensors: Mapping[str, TensorInfo]) -> str:
    return ", ".join(f"{suffix} {info.dtype} {info.shape}" for suffix, info in sorted(tensors.items()))
