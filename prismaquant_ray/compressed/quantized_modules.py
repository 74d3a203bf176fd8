"""Reading a compressed-tensors configuration: which modules of a repository are quantized, and in which format.

What a module is says its config group, found by vLLM's rules, and its tensors must be those of that format.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.families import family_of
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Codec
from prismaquant_ray.formats.int4 import WIDTHS
from prismaquant_ray.formats.tensor_names import INPUT_GLOBAL_SCALE, INPUT_SCALE, WEIGHT_GLOBAL_SCALE
from prismaquant_ray.forward.candidates import shipped
from prismaquant_ray.layout import LinearSpec, NameAlias, aliases_of
from prismaquant_ray.repository.routing import is_ignored, unreadable_because, vllm_route
from prismaquant_ray.source.block_fp8 import KEY
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.header import TensorInfo

# A tensor of such a name makes its module a quantized one.
_MARKS = frozenset(
    ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", INPUT_SCALE)
) | {WEIGHT_GLOBAL_SCALE, INPUT_GLOBAL_SCALE}
# A weight of such a dtype is no weight.
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
        """What its weights are stored as."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Of the decoded weight, as safetensors calls it."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Weight (rows, columns) from its tensors by suffix; those of activations are not needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Module(QuantizedModule):
    """One in a format of ours."""

    format: FormatName

    @property
    def codec(self) -> Codec:
        """What decodes it."""
        codec = FORMATS[self.format].codec
        assert codec is not None
        return codec

    @property
    def kind(self) -> str:
        """The format; how activations are rounded only tells NVFP4 from NVFP4A16."""
        return str(self.format)

    @property
    def dtype(self) -> str:
        """As our codecs decode."""
        return "BF16"

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """By the codec."""
        return self.codec.decode(tensors)


# Configuration ------------------------------------------------------------------------------------------------------


def is_quantized(source: Checkpoint) -> bool:
    """Whether config.json speaks of a quantization that reading the checkpoint does not undo."""
    return any(part.get(KEY) for part in _parts(source.config))


def read_quantization_config(
    source: Checkpoint, *, beyond_weights: tuple[str, ...] = _BEYOND_WEIGHTS
) -> dict[str, Any]:
    """The quantization_config, each group with its storage format, without `actorder`.

    InputError when there is none, or it alone shows that it cannot be decoded: it has something of `beyond_weights`.
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
    # A group's own format, where it has one, is the one that counts.
    groups = {
        name: {"format": scheme.get("format")} | _stated(group) for name, group in scheme["config_groups"].items()
    }
    return {**scheme, "config_groups": groups}


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]


def _without_order(scheme: dict[str, Any]) -> dict[str, Any]:
    """The same without `actorder`: g_idx says all there is to say, and compressed-tensors refuses to read `group`."""
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


def _stated(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if value is not None}


def unquantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model, not quantized."""
    kept = {key: value for key, value in config.items() if key != KEY}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in kept["text_config"].items() if key != KEY}
    return kept


def format_of(group: Mapping[str, Any]) -> FormatName | None:
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
        """The error when the tensors are not those of the group."""
        return InputError(
            f"{uri}: {self.name} has the scheme {self.route} ({describe_weights(self.group)}), but holds "
            f"{_listed(self.tensors)}, which is not {what}; config.json and the weights do not belong together"
        )


def coded_modules(source: Checkpoint, scheme: Mapping[str, Any], left_out: Collection[str] = ()) -> Iterator[Coded]:
    """Every module that holds codes, in the repository's order. InputError for one that the scheme does not know.

    `left_out` are tensors that belong to no module.
    """
    by_module: dict[str, dict[str, TensorInfo]] = {}
    for info in source.stored.values():
        if info.name not in left_out:
            parent, _, suffix = info.name.rpartition(".")
            by_module.setdefault(parent, {})[suffix] = info
    aliases = _aliases(source)
    for name, tensors in by_module.items():
        weight = tensors.get("weight")
        coded = not tensors.keys().isdisjoint(_MARKS) or (weight is not None and weight.dtype in _CODES)
        if not coded and not (weight is not None and len(weight.shape) == 2 and _is_named(scheme, name)):
            continue
        routes = (vllm_route(scheme, each) for each in aliases_of(name, aliases))
        route = next((route for route in routes if route is not None), None)
        if route is None:
            raise InputError(
                f"{source.store.uri}: {name} holds {_listed(tensors)}, but {KEY} has no scheme for it; "
                "config.json and the weights do not belong together"
            )
        own = {suffix: info for suffix, info in tensors.items() if suffix != "bias"}
        yield Coded(name, own, route, scheme["config_groups"][route])


def modules_of(source: Checkpoint) -> tuple[Module, ...]:
    """Every quantized module, in the repository's order. InputError for one that is not of a format of ours."""
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


def _aliases(source: Checkpoint) -> tuple[NameAlias, ...]:
    family = family_of(str(next(iter(source.config.get("architectures") or ()), "")))
    return family.aliases if family is not None else ()


def _is_named(scheme: Mapping[str, Any], module: str) -> bool:
    """Whether a target spells a module's last word: a pattern for whole layers reaches routers and norms, too."""
    word = re.compile(rf"(?<!\w){re.escape(module.rpartition('.')[2])}(?!\w)")
    return not is_ignored(scheme, module) and any(
        word.search(target) and (re.match(target[3:], module) if target.startswith("re:") else target == module)
        for group in scheme["config_groups"].values()
        for target in group["targets"]
    )


def module_of(coded: Coded, format_name: FormatName) -> Module | None:
    """The module if its tensors are those of its format."""
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
    if format_name is FormatName.INT4:
        width = coded.group["weights"]["group_size"]
        expected["weight_scale"] = ("BF16", (rows, columns // width if columns % width == 0 else 0))
    scale = tensors.get("weight_scale")
    if format_name is FormatName.FP8 and scale is not None and scale.dtype == "F32":
        expected["weight_scale"] = ("F32", (rows, 1))  # the runtime holds them in float32
    if {suffix: (info.dtype, info.shape) for suffix, info in tensors.items()} != expected:
        return None
    return Module(name=coded.name, group=coded.group, tensors=tensors, rows=rows, columns=columns, format=format_name)


def _listed(tensors: Mapping[str, TensorInfo]) -> str:
    return ", ".join(f"{suffix} {info.dtype} {info.shape}" for suffix, info in sorted(tensors.items()))
