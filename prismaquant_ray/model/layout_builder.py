"""From a checkpoint's configuration and headers to its layout. No weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.families import Family, family_of
from prismaquant_ray.families.base import NOT_A_LINEAR
from prismaquant_ray.families.serving import ServerNames, server_names
from prismaquant_ray.layout import Block, BlockKind, Layout, LinearSpec, Matrix
from prismaquant_ray.model.block_layout import WEIGHT, BlockLayouts
from prismaquant_ray.model.meta_model import MetaModel
from prismaquant_ray.model.mtp_head import DraftHead, is_draft
from prismaquant_ray.model.naming import Naming
from prismaquant_ray.model.on_meta import configured
from prismaquant_ray.model.rehearsal import NOTHING, Found
from prismaquant_ray.model.unknown_family import Derived, derive
from prismaquant_ray.source.protocol import TensorSource, tensor_of_shape
from prismaquant_ray.spelling import Spelling

if TYPE_CHECKING:
    from prismaquant_ray.config import Config

_BEHIND = "behind the last layer: only blocks and the output head are measured"
_TOWER = "it does not run on text, and its tower is not known"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """Parts that are measured beside the decoder: the vision tower (`images` to calibrate it), the output head."""

    images: bool = False
    head: bool = False


def scope_of(config: Config) -> Scope:
    """The scope of a run's configuration."""
    return Scope(images=config.calibration.images is not None, head=config.model.quantize_lm_head)


def transformers_config(checkpoint: TensorSource) -> Any:
    """The transformers configuration object of a checkpoint; InputError when transformers does not know or take it."""
    parts = (checkpoint.config, checkpoint.config.get("text_config") or {})
    if any("quantization_config" in part for part in parts):
        raise InputError(f"{checkpoint.store.uri} is already quantized; start from the BF16 model")
    return configured(checkpoint.config, checkpoint.store.uri)


def architecture_of(checkpoint: TensorSource) -> str:
    """The first entry of `architectures`."""
    names = checkpoint.config.get("architectures") or []
    if not names:
        raise InputError(f"{checkpoint.store.uri}: config.json names no architecture; add `architectures`")
    return str(names[0])


def build_layout(
    checkpoint: TensorSource,
    scope: Scope = Scope(),
    dtype: torch.dtype = torch.float32,
) -> tuple[MetaModel, Layout]:
    """MetaModel, which computes in `dtype`, and layout of a checkpoint.

    Raises:
        InputError: a tensor is missing or has another shape, or transformers cannot build the model.
    """
    architecture = architecture_of(checkpoint)
    family, serving = family_of(architecture), server_names(architecture)
    config = transformers_config(checkpoint)
    if family is not None:
        unknown = None
        meta_model = MetaModel(config, architecture, blocks_path=family.blocks, vision=family.vision, dtype=dtype)
    else:
        meta_model = MetaModel(config, architecture, dtype=dtype)
        _check_volume(checkpoint, meta_model)
        unknown = derive(meta_model, architecture, checkpoint.tensors, serving)
        family = unknown.family
    return meta_model, _Builder(checkpoint, meta_model, family, scope, unknown).layout(architecture, serving)


def _check_volume(checkpoint: TensorSource, meta_model: MetaModel) -> None:
    """InputError where the configuration is of a much larger model: a few tokens through that might take everything."""
    described = sum(math.prod(shape) for shape in meta_model.state.values())
    stored = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    # A tied matrix counts twice.
    if described > 4 * stored:
        raise InputError(
            f"{checkpoint.store.uri}: config.json describes {described:,} weights, there are {stored:,}; config.json "
            "and the weights do not belong together"
        )


class _Builder:
    """Parses every module name once."""

    def __init__(
        self,
        checkpoint: TensorSource,
        meta_model: MetaModel,
        family: Family,
        scope: Scope,
        unknown: Derived | None = None,
    ) -> None:
        self.unknown = unknown
        self.names = Naming(family, meta_model, unknown)
        self.found = [NOTHING for _ in meta_model.layers] if unknown is None else unknown.layers
        self.checkpoint = checkpoint
        self.meta_model = meta_model
        self.family = family
        self.scope = scope
        self.ignored: dict[str, str] = {}
        self.blocks: list[Block] = []
        self.block_layouts = BlockLayouts(checkpoint, self.names, family, self.ignored)

    def layout(self, architecture: str, serving: ServerNames | None) -> Layout:
        model, config = self.meta_model.model, self.meta_model.config
        embedding_module = model.get_input_embeddings()
        embedding = tuple(
            self.names.tensor(f"{path}.{name}")
            for path in self.meta_model.entry
            for name, _ in model.get_submodule(path).named_parameters(recurse=False)
        )
        pixels = self._vision()
        for index, layer in enumerate(self.meta_model.layers):
            self._add(BlockKind.DECODER, f"{self.meta_model.blocks_path}.{index}", layer, self.found[index])
        self._draft()
        head = self._head(embedding)
        copied = self._copied({*embedding, *pixels, *head})
        spellings = (*(() if serving is None else serving.spellings), *self.family.spellings)
        unknown, carried = self.unknown, self.meta_model.carried
        layout = Layout(
            architecture=architecture,
            family=self.family.name,
            blocks=tuple(self.blocks),
            embedding=embedding,
            pixels=pixels,
            head=head,
            ignored=self.ignored,
            facts=() if unknown is None else unknown.facts,
            guesses=(*(() if unknown is None else unknown.guesses), *copied),
            spellings=tuple(spelling for spelling in spellings if spelling != Spelling()),
            named_by=None if serving is None else serving.runtime,
            hidden_size=embedding_module.weight.shape[1],
            vocab_size=embedding_module.weight.shape[0],
            image_token=getattr(config, "image_token_id", None) if pixels else None,
            top_k=getattr(config.get_text_config(), "num_experts_per_tok", 0),
            row_width=embedding_module.weight.shape[1] if carried is None else carried.width,
            tied=self._tied(),
            kept_cache=self._kept_cache(),
        )
        if not layout.groups:
            within = f"{self.names.module(self.meta_model.blocks_path)}."
            reasons = [
                f"{name}: {why}"
                for name, why in self.ignored.items()
                if name.startswith(within) and why != NOT_A_LINEAR
            ]
            raise InputError(
                f"{self.meta_model.blocks_path} has no Linear that could be quantized"
                + (f" ({reasons[0]})" if reasons else "; is it the decoder?")
            )
        return layout

    # Parts of a model -----------------------------------------------------------------------------------------

    def _vision(self) -> tuple[str, ...]:
        """Blocks of the vision tower; the tensors before them."""
        vision = self.family.vision
        if vision is None:
            return ()
        if not self.scope.images:
            self._ignore_tensors(
                vision.tower, "vision tower: calibration.images is not given, so it cannot be measured"
            )
            return ()
        tower = self.meta_model.tower
        for index, layer in enumerate(self.meta_model.vision_layers):
            self._add(BlockKind.VISION, f"{vision.tower}.{vision.blocks}.{index}", layer)
        self._add(BlockKind.MERGER, f"{vision.tower}.{vision.merger}", tower.get_submodule(vision.merger))
        found = []
        for entry in vision.entry:
            module = tower.get_submodule(entry)
            for name, tensor in module.named_parameters():
                found.append(tensor_of_shape(self.checkpoint, f"{vision.tower}.{entry}.{name}", tuple(tensor.shape)))
            # None of them is quantized: the family says why.
            self.block_layouts.matrices(f"{vision.tower}.{entry}", module, relative=entry)
        return tuple(found)

    def _draft(self) -> None:
        """The multi-token-prediction head, which transformers does not load."""
        prefix = self.family.draft
        if prefix is None or not is_draft(self.checkpoint.tensors, prefix):
            return
        if any(name.startswith(f"{prefix}.layers.1.") for name in self.checkpoint.tensors):
            self._ignore_tensors(prefix, "draft head: more than one layer, which is not understood")
            return
        self._add(BlockKind.DRAFT, prefix, DraftHead(self.meta_model))

    def _head(self, embedding: Sequence[str]) -> tuple[str, ...]:
        """Tensors of the exit; the output head is a block of its own when it is to be quantized."""
        model = self.meta_model.model
        tower = f"{self.family.vision.tower}." if self.family.vision else None
        embedded = model.get_input_embeddings()
        own = next(f"{path}{WEIGHT}" for path, module in model.named_modules() if module is embedded)
        parameters = {
            # A tied head may come first, but the embedding is what is stored.
            self.names.tensor(own if parameter is embedded.weight else name): tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if (tower is None or not name.startswith(tower)) and self.names.runs(name.rpartition(".")[0])
        }
        self._check_head(embedding)
        for name, shape in parameters.items():
            tensor_of_shape(self.checkpoint, name, shape)
        head = tuple(name for name in parameters if name not in embedding)
        output = model.get_output_embeddings()
        tied = output is not None and output.weight is embedded.weight
        refused = (
            "it is tied to the embedding, which is never quantized"
            if tied
            else dict(self.family.ignored).get("lm_head")
        )
        if self.scope.head and refused is not None:
            raise InputError(f"model.quantize_lm_head is set, but the head stays: {refused}; remove the setting")
        for path, module in model.named_modules():
            if tower is not None and f"{path}.".startswith(tower):
                continue
            name = self.names.module(path)
            if module is output and self.scope.head:
                self._add_head(path, module)
            elif isinstance(module, nn.Linear | nn.Embedding):
                self.ignored[name] = self._outside(path, module, refused)
        return (*head, *embedding) if tied else head

    def _check_head(self, embedding: Sequence[str]) -> None:
        """InputError where the output head is neither stored nor tied: transformers would make up a random one."""
        model = self.meta_model.model
        output = model.get_output_embeddings()
        path = next((path for path, module in model.named_modules() if module is output), None)
        if path is None or output.weight is model.get_input_embeddings().weight:
            return
        name = self.names.tensor(f"{path}{WEIGHT}")
        if name not in self.checkpoint.tensors:
            raise InputError(
                f"{self.checkpoint.store.uri}: there is no {name}, and config.json does not tie the output head to "
                f"{embedding[0]}; without a head there is no loss to price by. Use the causal language model, or set "
                "tie_word_embeddings to true if its head is its embedding"
            )

    def _outside(self, path: str, module: nn.Module, refused: str | None) -> str:
        """Why a matrix outside the blocks stays."""
        if isinstance(module, nn.Embedding):
            return "embedding: never quantized"
        if path in self.meta_model.entry:
            return "before the first layer: only blocks and the output head are measured"
        if module is not self.meta_model.model.get_output_embeddings():
            return _BEHIND if self.names.runs(path) else _TOWER
        return refused or "output head: model.quantize_lm_head is not set"

    def _tied(self) -> tuple[str, str] | None:
        """Embedding and output head, where they are one by the configuration and two in the checkpoint."""
        model = self.meta_model.model
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        if output is None or output.weight is not embedding.weight:
            return None
        names = {id(module): self.names.tensor(f"{path}{WEIGHT}") for path, module in model.named_modules()}
        pair = names[id(embedding)], names[id(output)]
        return pair if self.checkpoint.tensors.keys() >= {*pair} else None

    def _kept_cache(self) -> str | None:
        """Why the KV cache cannot be rounded."""
        if getattr(self.meta_model.config.get_text_config(), "kv_lora_rank", None):
            return "vLLM does not find scales in the attention of a model that caches latent vectors"
        if self.block_layouts.kept_cache is None and not any(block.attention for block in self.blocks):
            return "no layer has keys and values to cache"
        return self.block_layouts.kept_cache

    def _add_head(self, path: str, module: nn.Linear) -> None:
        name = self.names.module(path)
        linear = LinearSpec(
            name=name,
            out_features=module.out_features,
            in_features=module.in_features,
            sources=(f"{name}{WEIGHT}",),
        )
        matrix = Matrix(name=name, input=name, linears=(linear,), parameters=(f"{path}{WEIGHT}",))
        parameters = self.block_layouts.parameters("", nn.ModuleDict({path: module}))
        self.blocks.append(self.block_layouts.block_of(len(self.blocks), BlockKind.HEAD, "", parameters, (matrix,)))

    def _copied(self, loaded: set[str]) -> tuple[str, ...]:
        """Mark the tensors that no part of the model loads as copied; a note about them."""
        loaded |= {tensor for block in self.blocks for tensor in block.tensors}
        towers = self.names.tensors_of_towers()
        for name in towers:
            if name not in loaded and len(self.checkpoint.tensors[name].shape) > 1:
                self.ignored.setdefault(name.removesuffix(WEIGHT), _TOWER)
        loaded |= towers
        left = [
            name
            for name in self.checkpoint.tensors
            # Not below an ignored module.
            if name not in loaded and not any(name[:dot] in self.ignored for dot in _dots(name))
        ]
        for name in left:
            if len(self.checkpoint.tensors[name].shape) > 1:
                self.ignored[name.removesuffix(WEIGHT)] = "not loaded by transformers; copied as it is"
        if not left:
            return ()
        return (f"{len(left)} tensors, {left[0]} the first, are not loaded by transformers and are copied as they are",)

    def _add(self, kind: BlockKind, prefix: str, module: nn.Module, found: Found = NOTHING) -> None:
        self.blocks.append(self.block_layouts.block(len(self.blocks), kind, prefix, module, found))

    def _ignore_tensors(self, prefix: str, reason: str) -> None:
        for name, info in self.checkpoint.tensors.items():
            if name.startswith(f"{prefix}.") and len(info.shape) > 1:
                self.ignored[name.removesuffix(WEIGHT)] = reason


def _dots(name: str) -> Iterator[int]:
    """Where the dots of a name are."""
    return (place for place, character in enumerate(name) if character == ".")
