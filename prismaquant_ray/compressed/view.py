"""A compressed-tensors repository of any origin, viewed as the BF16 model that a runtime computes with.

Weights are decoded on reading. Everything else is the repository's own, because some methods also change norms. Names
and shapes are those of the original model, so a `ModelRunner` can run it. Modules in our formats are decoded by our
codecs, all others by compressed-tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from prismaquant_ray.cache_rounding import CacheScale
from prismaquant_ray.compressed.activations import (
    InputRounding,
    StoredRoundings,
    format_of_inputs,
    format_of_weights,
    unroundable_because,
)
from prismaquant_ray.compressed.cache_scales import read_cache_scales, rounds_cache
from prismaquant_ray.compressed.caveats import cache_tensors, fused_caveats, scheme_caveats
from prismaquant_ray.compressed.decoded_repository import ModuleDecoder, decoded_outputs
from prismaquant_ray.compressed.foreign_modules import foreign_module, needs_shape, scheme_with_format
from prismaquant_ray.compressed.quantized_modules import (
    Coded,
    QuantizedModule,
    coded_modules,
    describe_weights,
    format_of,
    is_quantized,
    module_of,
    read_quantization_config,
    unquantized_config,
)
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS
from prismaquant_ray.formats.tensor_names import OF_INPUTS, WEIGHT_GLOBAL_SCALE
from prismaquant_ray.layout import CachedAttention, LinearSpec
from prismaquant_ray.repository.shards import Output
from prismaquant_ray.source.block_fp8 import ScaledWeight
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.files import INDEX
from prismaquant_ray.source.header import DTYPES, TensorInfo
from prismaquant_ray.source.protocol import Piece, tensor_info
from prismaquant_ray.source.ranges import read_pieces
from prismaquant_ray.storage.store import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Not counted in bits per parameter: tensors with a constant size per matrix.
_SCALARS = ("weight_shape", WEIGHT_GLOBAL_SCALE, *OF_INPUTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositorySizes:
    """Bytes and parameters of a repository.

    `linear_bytes` counts codes and scales of quantized Linears, without scalars and biases; `linear_parameters` their
    weights. `tensor_bytes` counts all stored tensors, `parameters` those of the model. `file_bytes` counts all files
    except further copies of the weights.
    """

    linear_bytes: int
    linear_parameters: int
    tensor_bytes: int
    parameters: int
    file_bytes: int


class RepositoryView:
    """A repository as the BF16 model it computes with; one that is not quantized is itself.

    `modules` are the quantized Linears by their name in the repository. `tensors` and `config` are those of the decoded
    model, `stored` the tensors in the files. Opening reads headers, and the shapes of integers packed without groups.

    Raises:
        InputError: a module cannot be decoded, or its inputs cannot be rounded; the message names it and its scheme.
    """

    #: Decoded tensors are read whole.
    divisible = False

    def __init__(self, store: Store) -> None:
        self.store = store
        self._source = source = Checkpoint(store)
        self.stored = source.stored
        self.modules: Mapping[str, QuantizedModule] = {}
        self._schemes: dict[str, QuantizationScheme] = {}
        self._caveats: tuple[str, ...] = ()
        self._outputs: dict[str, Output] | None = None
        self._rounds_cache = False
        self.tensors = source.tensors
        self.config = source.config
        if not is_quantized(source):
            if source.config is not source.source_config:
                self._caveats = ("FP8 in blocks without compressed-tensors' scheme: its activations are not rounded",)
            return
        scheme = read_quantization_config(source, beyond_weights=("transform_config", "sparsity_config"))
        schemes = {route: scheme_with_format(group) for route, group in scheme["config_groups"].items()}
        self._rounds_cache = rounds_cache(scheme)
        self._caveats = tuple(scheme_caveats(scheme, schemes))
        cache = cache_tensors(source, scheme, schemes)
        coded = list(coded_modules(source, scheme, cache))
        self.modules = {module.name: module for module in _modules(source, coded, schemes)}
        self._schemes = {module.name: schemes[module.route] for module in coded}
        decoder = ModuleDecoder(source, self.modules.values())
        outputs = decoded_outputs(source, self.modules.values(), decoder, left_out=cache)
        self._outputs = {output.name: output for output in outputs}
        self.tensors = {name: _info(output) for name, output in self._outputs.items()}
        self.config = unquantized_config(source.config)

    @property
    def blocks(self) -> Mapping[str, ScaledWeight]:
        """Weights that the files have as FP8 in blocks without compressed-tensors' scheme."""
        return self._source.blocks

    def other_files(self) -> list[str]:
        """Top-level files that are not weights of any kind."""
        return self._source.other_files()

    def fingerprint(self) -> str:
        """SHA-256 over the headers and samples of the tensor data."""
        return self._source.fingerprint()

    # Weights ----------------------------------------------------------------------------------------------------

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Decoded tensors of the model.

        Raises:
            InputError: a tensor is missing or decodes to NaN or infinity.
        """
        if self._outputs is None:
            return self._source.read(names)
        outputs = [self._outputs[tensor_info(self, name).name] for name in names]
        stream = read_pieces(piece for output in outputs for piece in output.pieces)
        found: dict[str, Tensor] = {}
        for output in outputs:
            data = torch.empty(output.nbytes, dtype=torch.uint8)
            view, start = data.numpy().data, 0
            for _ in output.pieces:
                info, buffer = next(stream)
                view[start : start + info.nbytes] = memoryview(buffer).cast("B")
                start += info.nbytes
            found[output.name] = data.view(DTYPES[output.dtype]).reshape(output.shape)
        return found

    def piece(self, name: str) -> Piece:
        """A tensor's decoded bytes, for read_pieces."""
        return self._source.piece(name) if self._outputs is None else (self, tensor_info(self, name))

    @property
    def uri(self) -> str:
        """URI of the repository."""
        return self.store.uri

    def get_ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Bytes [start, stop) of each range of a decoded tensor; its file is its name."""
        data = self.read([file])[file].contiguous().view(-1).view(torch.uint8).numpy().data
        return [data[start:stop] for start, stop in ranges]

    # Activations ------------------------------------------------------------------------------------------------

    def roundings(self) -> Mapping[str, InputRounding]:
        """Input roundings by module name, for modules whose scheme quantizes inputs.

        A static scale is read on access of its module; InputError if it is not a positive number.
        """
        return StoredRoundings(self._source, self.modules, self._schemes)

    def cache_scales(self, attention: Sequence[CachedAttention]) -> dict[str, CacheScale]:
        """The scales of an FP8 KV cache for these attentions; none where the cache is not rounded, or not as here.

        Raises:
            InputError: a scale is not a positive number, or has a shape that vLLM does not take.
        """
        return read_cache_scales(self._source, attention) if self._rounds_cache else {}

    # Figures ----------------------------------------------------------------------------------------------------

    @property
    def formats(self) -> dict[str, int]:
        """Number of modules by format, most frequent first."""
        labels = Counter(_label(module, self._schemes[name]) for name, module in self.modules.items())
        return dict(labels.most_common())

    @cached_property
    def caveats(self) -> tuple[str, ...]:
        """One line for each property that is not measured, and for scales that vLLM does not apply as stored.

        Reads the scalars of every module; of a layer's experts only those of the first.
        """
        return (*self._caveats, *fused_caveats(self._source, self.modules))

    def sizes(self) -> RepositorySizes:
        """Bytes and parameters; asks the store for the size of every file."""
        files = [*self._source.files, *self.other_files(), INDEX]
        return RepositorySizes(
            linear_bytes=sum(_module_bytes(module) for module in self.modules.values()),
            linear_parameters=sum(module.rows * module.columns for module in self.modules.values()),
            tensor_bytes=sum(info.nbytes for info in self.stored.values()),
            parameters=sum(math.prod(info.shape) for info in self.tensors.values()),
            file_bytes=sum(self.store.size(file) or 0 for file in files),
        )

    def linear_bytes(self, linear: LinearSpec) -> int:
        """Stored bytes of a Linear, of all experts: codes and scales, or the weight where it is not quantized."""
        quantized = [self.modules[name] for name in linear.names if name in self.modules]
        kept = len(linear.names) - len(quantized)
        if not kept:
            return sum(map(_module_bytes, quantized))
        first = tensor_info(self, linear.sources[0])
        width = DTYPES[first.dtype].itemsize
        return sum(map(_module_bytes, quantized)) + kept * linear.out_features * linear.in_features * width


# Modules ------------------------------------------------------------------------------------------------------------


def _modules(
    source: Checkpoint, coded: Sequence[Coded], schemes: Mapping[str, QuantizationScheme]
) -> Iterator[QuantizedModule]:
    """Modules, decoded by our codec if their tensors are in one of our formats, else by compressed-tensors."""
    uri = source.store.uri
    formats = {module.route: format_of(module.group) for module in coded}
    shapes = {
        module.name: module.tensors["weight_shape"].name
        for module in coded
        if formats[module.route] is None and needs_shape(module, schemes[module.route])
    }
    stated = source.read(shapes.values())
    for module in coded:
        scheme, name = schemes[module.route], formats[module.route]
        found: QuantizedModule | None = module_of(module, name) if name is not None else None
        if found is None:
            columns = stated[shapes[module.name]].tolist()[-1] if module.name in shapes else None
            found = foreign_module(module, scheme, uri, columns)
        inputs = scheme.input_activations
        refused = unroundable_because(found, inputs) if inputs is not None else None
        if refused is not None:
            raise InputError(
                f"{uri}: {module.name} has the scheme {module.route} ({describe_weights(module.group)}), whose inputs "
                f"cannot be rounded: {refused}"
            )
        yield found


def _module_bytes(module: QuantizedModule) -> int:
    return sum(info.nbytes for suffix, info in module.tensors.items() if suffix not in _SCALARS)


def _info(output: Output) -> TensorInfo:
    """A tensor of the model; its file is its own name."""
    return TensorInfo(
        name=output.name, file=output.name, dtype=output.dtype, shape=output.shape, start=0, stop=output.nbytes
    )


# Names --------------------------------------------------------------------------------------------------------------


def _label(module: QuantizedModule, scheme: QuantizationScheme) -> str:
    """The name of our format; else widths, type and scales of weights and inputs."""
    weights, inputs = scheme.weights, scheme.input_activations
    name = format_of_weights(module)
    if name is not None:
        ours = format_of_inputs(inputs, name) if inputs is not None else None
        rounds = FORMATS[name].round_activation is not None
        if ours is FORMATS[name] if rounds else inputs is None:
            return str(name)
    words = [f"W{weights.num_bits}A{inputs.num_bits if inputs is not None else 16}", str(weights.type)]
    words.append(_scales(weights))
    if inputs is not None:
        kind = "" if inputs.type == weights.type else f"{inputs.type} "
        words.append(f"with {'dynamic' if inputs.dynamic else 'static'} {kind}{_scales(inputs)} inputs")
    return " ".join(words)


def _scales(args: QuantizationArgs) -> str:
    size = "×".join(map(str, args.block_structure)) if args.strategy == "block" else args.group_size
    words = [str(args.strategy), str(size or ""), "" if args.symmetric else "asymmetric"]
    return " ".join(word for word in words if word)
