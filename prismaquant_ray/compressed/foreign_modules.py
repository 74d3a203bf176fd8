"""Quantized modules in none of our formats: compressed-tensors decodes them.

The expected tensors are known before reading, so a module that cannot be decoded is refused by its header.
Limits: integers of up to 8 bits, E2M1, E2M3 and E4M3; scales by tensor, channel, group and block; no transforms, and no
sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from prismaquant_ray.compressed.quantized_modules import Coded, QuantizedModule, describe_weights
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats.tensor_names import OF_INPUTS, WEIGHT_GLOBAL_SCALE
from prismaquant_ray.source.header import TensorInfo

PACKED = CompressionFormat.pack_quantized.value
_MX = tuple(
    kind.value
    for kind in (
        CompressionFormat.mxfp4_pack_quantized,
        CompressionFormat.mxfp6_pack_quantized,
        CompressionFormat.mxfp8_quantized,
    )
)
_FLOAT_PACKED = (
    CompressionFormat.nvfp4_pack_quantized.value,
    CompressionFormat.mxfp4_pack_quantized.value,
    CompressionFormat.mxfp6_pack_quantized.value,
)
_PLAIN = tuple(
    kind.value
    for kind in (
        CompressionFormat.naive_quantized,
        CompressionFormat.int_quantized,
        CompressionFormat.float_quantized,
        CompressionFormat.mxfp8_quantized,
    )
)
_FLOATS = ("BF16", "F16", "F32")
_G_IDX = "weight_g_idx"
_ZERO = "weight_zero_point"

Expected = dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignModule(QuantizedModule):
    """A module that compressed-tensors decodes."""

    scheme: QuantizationScheme

    @property
    def kind(self) -> str:
        """Its config group."""
        return describe_weights(self.group)

    @property
    def dtype(self) -> str:
        """F16 if its scales are F16, else BF16."""
        return "F16" if self.tensors["weight_scale"].dtype == "F16" else "BF16"

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Decode with the format's compressor; InputError if g_idx does not group the columns."""
        own = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in OF_INPUTS}
        if self.args.symmetric:
            own.pop(_ZERO, None)  # older writers stored zeros, which loading ignores
        order = self._order(own.pop(_G_IDX, None))
        if order is not None:
            shape = torch.Size((self.rows, self.columns))
            codes = unpack_from_int32(own["weight_packed"], self.args.num_bits, shape)
            own["weight_packed"] = pack_to_int32(codes[:, order].contiguous(), self.args.num_bits)
        compressor = BaseCompressor.get_value_from_registry(str(self.scheme.format))
        decoded: Tensor = compressor.decompress(own, self.scheme)["weight"]
        if order is not None:
            decoded = decoded[:, order.argsort()]
        return decoded.to(torch.float16 if self.dtype == "F16" else torch.bfloat16).contiguous()

    @property
    def args(self) -> QuantizationArgs:
        """Quantization arguments of the weights."""
        return self.scheme.weights

    def _order(self, groups: Tensor | None) -> Tensor | None:
        """Permutation that sorts columns by group; None without g_idx, or if it holds −1 (no grouping)."""
        if groups is None or bool((groups == -1).any()):
            return None
        width = self.args.group_size
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order].long(), torch.arange(self.columns) // width):
            raise InputError(
                f"{self.name}.{_G_IDX} does not put {width} of {self.columns} columns into each group; the "
                "repository is damaged, fetch or make it again"
            )
        return order


def scheme_with_format(group: Mapping[str, object]) -> QuantizationScheme:
    """A config group validated by compressed-tensors; a missing or mixed format is inferred."""
    named = group["format"]
    if named in (CompressionFormat.mixed_precision.value, "fakequant", None):
        scheme = QuantizationScheme.model_validate({key: value for key, value in group.items() if key != "format"})
        if scheme.weights is not None:
            scheme.format = infer_module_format(torch.nn.Linear, scheme).value
        return scheme
    return QuantizationScheme.model_validate(group)


def foreign_module(coded: Coded, scheme: QuantizationScheme, uri: str, columns: int | None) -> ForeignModule:
    """The module. `columns` comes from `weight_shape` if `needs_shape`, else it is None.

    Raises:
        InputError: the scheme is not supported, or the tensors do not fit it.
    """
    refused = _refusal(scheme)
    if refused is not None:
        raise InputError(
            f"{uri}: {coded.name} has the scheme {coded.route} ({describe_weights(coded.group)}), which is not "
            f"decoded: {refused}"
        )
    codes = coded.tensors.get(_codes(scheme))
    if codes is None or len(codes.shape) != 2 or codes.nbytes == 0:
        raise coded.misfit(uri, f"what that stores: there are no codes ({_codes(scheme)})")
    rows = codes.shape[0]
    found = ForeignModule(
        name=coded.name,
        group=coded.group,
        tensors=coded.tensors,
        rows=rows,
        columns=columns if columns is not None else _columns(scheme, codes, coded.tensors),
        scheme=scheme,
    )
    wrong = next(_misfits(found), None)
    if wrong is not None:
        raise coded.misfit(uri, f"what that stores, in its {wrong}")
    return found


def needs_shape(coded: Coded, scheme: QuantizationScheme) -> bool:
    """Whether only `weight_shape` has the exact number of columns: packed words are padded."""
    weights = scheme.weights
    return (
        "weight_shape" in coded.tensors
        and weights is not None
        and scheme.format == PACKED
        and weights.group_size is None
    )


def _refusal(scheme: QuantizationScheme) -> str | None:
    weights = scheme.weights
    if weights is None:
        return "it quantizes no weights"
    if scheme.format not in (PACKED, *_FLOAT_PACKED, *_PLAIN):
        return f"the format {scheme.format} is unknown to compressed-tensors now, or holds no codes"
    if weights.dynamic:
        return "its weights are dynamic"
    if weights.type == "float" and (not weights.symmetric or weights.num_bits not in (4, 6, 8)):
        return "floats have 4, 6 or 8 bits and no zero point"
    if weights.type == "int" and not 1 <= weights.num_bits <= 8:
        return "integers have 1 to 8 bits"
    if (weights.type == "int") != (scheme.format == PACKED) and scheme.format in (PACKED, *_FLOAT_PACKED, _MX[-1]):
        return "the format is for the other type"
    if weights.strategy not in ("tensor", "channel", "group", "tensor_group", "block"):
        return f"scales by {weights.strategy}"
    return None


def _codes(scheme: QuantizationScheme) -> str:
    return "weight" if scheme.format in _PLAIN else "weight_packed"


def _columns(scheme: QuantizationScheme, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> int:
    """Columns, from the shape of whole codes, or from the groups of the scales for packed words."""
    if scheme.format in _PLAIN:
        return codes.shape[1]
    bits = scheme.weights.num_bits
    scale = tensors.get("weight_scale")
    if scheme.format == PACKED and scheme.weights.group_size is not None and scale is not None and scale.shape:
        return int(scale.shape[-1]) * int(scheme.weights.group_size)
    return codes.nbytes * 8 // codes.shape[0] // int(bits)


def _misfits(module: ForeignModule) -> Iterator[str]:
    """Suffixes of tensors that are missing, unknown, or have another dtype or shape."""
    expected = _expected(module)
    for suffix, (dtypes, shapes) in expected.items():
        info = module.tensors.get(suffix)
        if info is None or info.dtype not in dtypes or info.shape not in shapes:
            yield suffix
    optional = {_ZERO} if module.args.symmetric else set()
    if module.scheme.format == PACKED and module.args.strategy == "group":
        optional.add(_G_IDX)
        order = module.tensors.get(_G_IDX)
        if order is not None and (order.dtype not in ("I32", "I64") or order.shape != (module.columns,)):
            yield _G_IDX
    yield from module.tensors.keys() - expected.keys() - optional - set(OF_INPUTS)
    width = module.args.group_size
    if width is not None and module.columns % width:
        yield "weight_scale"


def _expected(module: ForeignModule) -> Expected:
    """Allowed dtypes and shapes by suffix."""
    args, kind, rows, columns = module.args, module.scheme.format, module.rows, module.columns
    bits = int(args.num_bits)
    grid = _grid(args, rows, columns)
    scales = ("U8",) if kind in _MX else ("F8_E4M3",) if kind in _FLOAT_PACKED else _FLOATS
    expected: Expected = {"weight_scale": (scales, grid)}
    if kind == PACKED:
        expected["weight_packed"] = (("I32",), ((rows, math.ceil(columns * bits / 32)),))
        expected["weight_shape"] = (("I64", "I32"), ((2,),))
    elif kind in _FLOAT_PACKED:
        expected["weight_packed"] = (("U8",), ((rows, columns * bits // 8),))
    else:
        expected["weight"] = (("F8_E4M3",) if args.type == "float" else ("I8",), ((rows, columns),))
    if args.strategy == "tensor_group":
        expected[WEIGHT_GLOBAL_SCALE] = (("F32",), ((1,),))
    if not args.symmetric:
        packed = kind == PACKED and args.strategy in ("group", "channel")
        zeros = ((math.ceil(rows * bits / 32), grid[0][1]),) if packed else grid
        expected[_ZERO] = (("I32",) if packed else ("I8",), zeros)
    return expected


def _grid(args: QuantizationArgs, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Allowed shapes of scales."""
    if args.strategy == "tensor":
        return (1,), (), (1, 1)
    if args.strategy == "channel":
        return ((rows, 1),)
    if args.strategy == "block":
        height, width = args.block_structure
        return ((math.ceil(rows / height), math.ceil(columns / width)),)
    return ((rows, columns // args.group_size),)
