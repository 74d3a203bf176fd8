"""What vLLM needs to run every format on a CPU. Import after vLLM's environment is set.

Untouched are the configuration, the matching of targets, the choice of schemes, the parameters and their loaders. Not
stock are these. vLLM's emulation kernels are registered for the CPU, where it lists none. A quantized Linear
multiplies by the BF16 weight that vLLM itself makes of the loaded parameters, unless `ROUNDING` is on: then the kernel
runs, with its rounding of activations, of which those for MXFP4 and MXFP8 have none. The formats whose kernels neither
run nor are emulated on a CPU (FP8_BLOCK, INT8, integers but INT4, FP8 activations under 4-bit weights) have the
parameters and loaders of vLLM, and multiply by what was loaded; INT4A8 is taken to be on SM90, where alone vLLM has it.
Experts are loaded by the method vLLM chose and computed in BF16. Every other Linear, too, is multiplied by torch, so
that a model and its BF16 copy compute alike to the last bit: routers of random experts turn a last bit into another
expert. And model classes are inspected in this process, because in vLLM's helper process what `media` does would not be
done.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import vllm.model_executor.kernels.linear as kernels
from torch import Tensor, nn
from vllm import _custom_ops
from vllm.model_executor.kernels.linear.mxfp4.emulation import EmulationMxfp4LinearKernel
from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_mxfp4 as moe_mxfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as moe_nvfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as moe_fp8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_int8 as moe_int8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_mxfp8 as moe_mxfp8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as moe_wna16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4
from vllm.model_executor.layers.quantization.utils.mxfp8_utils import dequant_mxfp8_to_bf16
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import break_fp4_bytes, dequantize_to_dtype
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.model_executor.models import registry
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

#: whether quantized Linears round their activations, by vLLM's kernels
ROUNDING = SimpleNamespace(on=False)

Parameters = dict[str, Tensor]


def register() -> None:
    """Teach vLLM to run quantized layers on the CPU; once a process, before an engine is made."""
    kernels.register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    kernels.register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    kernels.register_linear_kernel(_Mxfp4Kernel, PlatformEnum.CPU, "mxfp4")
    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False
    kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [_StoredKernel]
    kernels._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU] = [_StoredKernel]
    kernels._POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, _StoredKernel)
    CompressedTensorsConfig._is_fp8_w4a8_sm90 = staticmethod(CompressedTensorsConfig._is_fp8_w4a8)
    registry._run_in_subprocess = lambda inspect: inspect()
    _allow_weight_only_nvfp4()
    _keep_stored_weights()
    _compute_experts_in_bf16()


def format_of(method: Any, scheme: Any) -> str:
    """The format's name in this project, for a Linear's scheme or, without one, the experts' method."""
    name = type(method if scheme is None else scheme).__name__
    found, owner = _FORMATS.get(name, name), method if scheme is None else scheme
    if found == "NVFP4" and owner.use_a16:
        return "NVFP4A16"
    if found == "FP8" and owner.weight_block_size is not None:
        return "FP8_BLOCK"
    if found == "INT4" and owner.num_bits != 4:
        return f"INT{owner.num_bits}A16"
    return found


_FORMATS = {
    "CompressedTensorsW4A4Fp4": "NVFP4",
    "CompressedTensorsW4A4Nvfp4MoEMethod": "NVFP4",
    "CompressedTensorsW4A4Mxfp4": "MXFP4",
    "CompressedTensorsW4A4Mxfp4MoEMethod": "MXFP4",
    "CompressedTensorsW8A8Mxfp8": "MXFP8",
    "CompressedTensorsW8A8Mxfp8MoEMethod": "MXFP8",
    "CompressedTensorsW8A8Fp8": "FP8",
    "CompressedTensorsW8A8Fp8MoEMethod": "FP8",
    "CompressedTensorsWNA16": "INT4",
    "CompressedTensorsWNA16MoEMethod": "INT4",
    "CompressedTensorsW8A8Int8": "INT8",
    "CompressedTensorsW8A8Int8MoEMethod": "INT8",
    "CompressedTensorsW4A8Fp8": "INT4A8",
    "CompressedTensorsW4A8Mxfp4": "MXFP4A8",
    "UnquantizedLinearMethod": "BF16",
    "UnquantizedEmbeddingMethod": "BF16",
    "UnquantizedFusedMoEMethod": "BF16",
}


# ---------------------------------------------------------------------------------------------- kernels


class _Mxfp4Kernel(EmulationMxfp4LinearKernel):
    """vLLM's, which rounds with a package for other hardware: here its weights are right and nothing is rounded."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:  # noqa: ARG003
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.stored_weight, bias)


class _StoredKernel:
    """In place of kernels that a CPU does not have: the weight that was loaded is multiplied. INT4 has its own."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:  # noqa: ARG003
        return True, None

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    def input_quant_key(self) -> None:
        return None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return getattr(config, "weight_type", None) != scalar_types.uint4b8, "it is INT4"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.stored_weight, bias)


class _WeightOnlyNvfp4Kernel(EmulationNvFp4LinearKernel):
    """vLLM's without the rounding."""

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.stored_weight, bias)


def _allow_weight_only_nvfp4() -> None:
    """vLLM insists on Marlin, a GPU kernel, for NVFP4 without rounded activations."""
    original = compressed_tensors_w4a4_nvfp4.init_nvfp4_linear_kernel

    def init(use_a16: bool = False) -> Any:
        return _WeightOnlyNvfp4Kernel(kernels.NvFp4LinearLayerConfig()) if use_a16 else original()

    compressed_tensors_w4a4_nvfp4.init_nvfp4_linear_kernel = init


# ---------------------------------------------------------------------------------------------- loading


def _mark_unloaded(method: Any) -> None:
    """Let a method's parameters be NaN until they are loaded.

    vLLM keeps account of parameters, not of the parts that several tensors fill: it does not notice when one of q, k
    and v, or one expert of many, lacks its scale.
    """
    create = method.create_weights

    def create_marked(self: Any, layer: nn.Module, *arguments: Any, **keywords: Any) -> None:
        create(self, layer, *arguments, **keywords)
        for parameter in layer.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data.fill_(torch.nan)

    method.create_weights = create_marked


def _refuse_unloaded(layer: nn.Module, name: str) -> None:
    """Raise ValueError if a part of a parameter never came."""
    for suffix, parameter in layer.named_parameters(recurse=False):
        if parameter.is_floating_point() and parameter.float().isnan().any():
            raise ValueError(f"a part of {name}.{suffix} was not initialized from checkpoint")


# ---------------------------------------------------------------------------------------------- Linears


def _keep_stored_weights() -> None:
    """Every quantized Linear and head gets `stored_weight`, and multiplies by it while `ROUNDING` is off."""
    process = CompressedTensorsLinearMethod.process_weights_after_loading
    apply = CompressedTensorsLinearMethod.apply

    def process_and_keep(self: Any, layer: nn.Module) -> None:
        _refuse_unloaded(layer, layer.prefix)
        loaded = {name: parameter.data.clone() for name, parameter in layer.named_parameters(recurse=False)}
        process(self, layer)
        layer.stored_weight = _LINEAR[format_of(self, layer.scheme)](layer, loaded)

    def apply_stored(self: Any, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not ROUNDING.on:
            return nn.functional.linear(x, layer.stored_weight, bias)
        # The emulation takes matrices, but vision towers pass batches of them.
        return apply(self, layer, x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)

    _mark_unloaded(CompressedTensorsLinearMethod)
    CompressedTensorsLinearMethod.process_weights_after_loading = process_and_keep
    CompressedTensorsLinearMethod.apply = apply_stored


#: BF16 weight of a Linear, from the layer as vLLM's kernel left it or from the parameters `p` as they were loaded
_LINEAR: dict[str, Callable[[nn.Module, Parameters], Tensor]] = {
    "NVFP4": lambda layer, _: _nvfp4(layer.weight.data, layer.weight_scale.data, layer.weight_global_scale),
    "MXFP8": lambda layer, _: layer.weight.data,
    "MXFP4": lambda _, p: _mxfp4(p["weight_packed"], p["weight_scale"]),
    "FP8": lambda _, p: _fp8(p["weight"], p["weight_scale"]),
    "INT4": lambda _, p: _int4(p["weight_packed"], p["weight_scale"]),
    "MXFP4A8": lambda _, p: _mxfp4(p["weight_packed"], p["weight_scale"]),
    "FP8_BLOCK": lambda _, p: _fp8_block(p["weight"], p["weight_scale"]),
    "INT8": lambda _, p: _scaled(p["weight"].float(), p["weight_scale"].float()),
    "INT4A8": lambda _, p: _int4(p["weight_packed"], _on_hopper(p["weight_scale"])),
    **{f"INT{n}A16": lambda _, p, bits=n: _ints(p["weight_packed"], p["weight_scale"], bits) for n in (3, 6, 8)},
}
_LINEAR["NVFP4A16"] = _LINEAR["NVFP4"]


# ---------------------------------------------------------------------------------------------- experts


def _compute_experts_in_bf16() -> None:
    """Methods choose no GPU kernel, load as ever, and hand over to the unquantized method when all is loaded."""
    for module, select, backend in (
        (moe_nvfp4, "select_nvfp4_moe_backend", NvFp4MoeBackend.EMULATION),
        (moe_mxfp8, "select_mxfp8_moe_backend", Fp8MoeBackend.EMULATION),
        (moe_fp8, "select_fp8_moe_backend", Fp8MoeBackend.EMULATION),
        (moe_wna16, "select_wna16_moe_backend", WNA16MoEBackend.EMULATION),
        (moe_int8, "select_int8_moe_backend", Int8MoeBackend.TRITON),
    ):
        assert hasattr(module, select)
        setattr(module, select, lambda *_, chosen=backend, **__: (chosen, CPUUnquantizedExperts))
    for method in (
        moe_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod,
        moe_mxfp4.CompressedTensorsW4A4Mxfp4MoEMethod,
        moe_mxfp8.CompressedTensorsW8A8Mxfp8MoEMethod,
        moe_fp8.CompressedTensorsW8A8Fp8MoEMethod,
        moe_wna16.CompressedTensorsWNA16MoEMethod,
        moe_int8.CompressedTensorsW8A8Int8MoEMethod,
    ):
        _mark_unloaded(method)
        method.process_weights_after_loading = _hand_over


def _hand_over(self: Any, layer: nn.Module) -> None:
    """Decode the loaded experts, then go on as if the file had held BF16."""
    _refuse_unloaded(layer, layer.layer_name)
    layer.stored_format = format_of(self, None)
    decode = _EXPERTS[layer.stored_format]
    loaded = {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
    layer.stored_weight = {matrix: decode(loaded, matrix) for matrix in ("w13", "w2")}
    for name in loaded:
        if not name.endswith("bias"):
            delattr(layer, name)
    for matrix, weight in layer.stored_weight.items():
        layer.register_parameter(f"{matrix}_weight", nn.Parameter(weight.clone(), requires_grad=False))
    layer.quant_method = UnquantizedFusedMoEMethod(layer.moe_config)
    layer.quant_method.process_weights_after_loading(layer)


def _nvfp4_experts(loaded: Parameters, matrix: str) -> Tensor:
    """As `CompressedTensorsW4A4Nvfp4MoEMethod` does: the gate's global scale serves gate and up."""
    divisor = loaded[f"{matrix}_weight_global_scale"]
    divisor = divisor[:, 0] if divisor.dim() == 2 else divisor
    return _nvfp4(loaded[f"{matrix}_weight_packed"], loaded[f"{matrix}_weight_scale"], 1.0 / divisor)


#: BF16 weights (E, O, I) of all experts' `w13` or `w2`
_EXPERTS: dict[str, Callable[[Parameters, str], Tensor]] = {
    "NVFP4": _nvfp4_experts,
    "MXFP8": lambda p, m: dequant_mxfp8_to_bf16(p[f"{m}_weight"], p[f"{m}_weight_scale"]),
    "MXFP4": lambda p, m: _mxfp4(p[f"{m}_weight_packed"], p[f"{m}_weight_scale"]),
    "FP8": lambda p, m: _fp8(p[f"{m}_weight"], p[f"{m}_weight_scale"]),
    "INT4": lambda p, m: _int4(p[f"{m}_weight_packed"], p[f"{m}_weight_scale"]),
    "FP8_BLOCK": lambda p, m: _fp8_block(p[f"{m}_weight"], p[f"{m}_weight_scale"]),
    "INT8": lambda p, m: _scaled(p[f"{m}_weight"].float(), p[f"{m}_weight_scale"].float()),
    **{
        f"INT{n}A16": lambda p, m, bits=n: _ints(p[f"{m}_weight_packed"], p[f"{m}_weight_scale"], bits)
        for n in (3, 6, 8)
    },
}


# ---------------------------------------------------------------------------------------------- decoding


def _nvfp4(packed: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    return dequantize_to_dtype(packed.view(torch.uint8), scale, factor, torch.bfloat16, 16, swizzle=False)


def _mxfp4(packed: Tensor, scale: Tensor) -> Tensor:
    values = break_fp4_bytes(packed.flatten(0, -2), torch.float32).view(*packed.shape[:-1], -1)
    return _scaled(values, torch.exp2(scale.float() - 127))


def _fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return _scaled(weight.float(), scale.float())


def _int4(packed: Tensor, scale: Tensor) -> Tensor:
    offset = unpack_quantized_values_into_int32(packed, scalar_types.uint4b8, packed.dim() - 1)
    return _scaled((offset - 8).float(), scale.float())


def _ints(packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """A row is one string of bits, the lowest first, without gaps: vLLM's parameters have no room for any."""
    string = ((packed.unsqueeze(-1) >> torch.arange(32)) & 1).flatten(-2).unflatten(-1, (-1, bits))
    return _scaled((string * (1 << torch.arange(bits))).sum(-1).float() - (1 << bits - 1), scale.float())


def _on_hopper(scale: Tensor) -> Tensor:
    """What `convert_bf16_scales_to_fp8` makes of stored scales: E4M3 under one float32 scale per row."""
    of_row = (scale.float().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    of_group = (scale.float() / of_row).to(torch.float8_e4m3fn)
    return (of_group.float() / 8).to(torch.float8_e4m3fn).float() * (of_row * 8)


def _fp8_block(weight: Tensor, scale: Tensor) -> Tensor:
    """Of blocks of 128 × 128, the last rows of which may be fewer."""
    rows = scale.float().repeat_interleave(128, -2)[..., : weight.shape[-2], :]
    return _scaled(weight.float(), rows)


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    """BF16 values (…, O, I) times scales (…, O, G) of groups along I."""
    grouped = values.unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)
