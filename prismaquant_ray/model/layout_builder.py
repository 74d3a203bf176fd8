"""From a checkpoint's configuration and headers to its layout. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.families import Family, family_of
from prismaquant_ray.families.base import NOT_A_LINEAR
from prismaquant_ray.layout import EXPERT, Block, BlockKind, FusedGroup, Layout, LinearSpec, Matrix, Parameter
from prismaquant_ray.model.experts import is_packed, unquantizable
from prismaquant_ray.model.meta_model import MetaModel
from prismaquant_ray.model.mtp_head import DraftHead, is_draft
from prismaquant_ray.model.naming import Naming
from prismaquant_ray.model.unknown_family import Derived, derive
from prismaquant_ray.source.config_json import with_numbers
from prismaquant_ray.source.protocol import TensorSource, tensor_info

if TYPE_CHECKING:
    from prismaquant_ray.config import Config

_WEIGHT = ".weight"
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
    """The transformers configuration object of a checkpoint; InputError when transformers does not know it."""
    from transformers import CONFIG_MAPPING

    model_type = checkpoint.config.get("model_type")
    parts = (checkpoint.config, checkpoint.config.get("text_config") or {})
    if any("quantization_config" in part for part in parts):
        raise InputError(f"{checkpoint.store.uri} is already quantized; start from the BF16 model")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{checkpoint.store.uri}: transformers does not know model_type {model_type!r}; update transformers "
            "or check config.json"
        )
    return CONFIG_MAPPING[model_type].from_dict(with_numbers(checkpoint.config))


def architecture_of(checkpoint: TensorSource) -> str:
    """The first entry of `architectures`."""
    names = checkpoint.config.get("architectures") or []
    if not names:
        raise InputError(f"{checkpoint.store.uri}: config.json names no architecture; add `architectures`")
    return str(names[0])


def build_layout(checkpoint: TensorSource, scope: Scope = Scope()) -> tuple[MetaModel, Layout]:
    """MetaModel and layout of a checkpoint.

    Raises:
        InputError: a tensor is missing or has another shape, or transformers cannot build the model.
    """
    architecture = architecture_of(checkpoint)
    known = family_of(architecture)
    config = transformers_config(checkpoint)
    if known is not None:
        meta_model = MetaModel(config, architecture, blocks_path=known.blocks, vision=known.vision)
        return meta_model, _Builder(checkpoint, meta_model, known, scope).layout(architecture, ())
    meta_model = MetaModel(config, architecture)
    unknown = derive(meta_model, architecture, checkpoint.tensors)
    builder = _Builder(checkpoint, meta_model, unknown.family, scope, unknown)
    return meta_model, builder.layout(architecture, unknown.guesses)


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
        self.names = Naming(family, meta_model, unknown)
        self.kept = [{} for _ in meta_model.layers] if unknown is None else unknown.kept
        self.checkpoint = checkpoint
        self.meta_model = meta_model
        self.family = family
        self.scope = scope
        self.reasons = dict(family.ignored)
        self.rule_of = {member: rule for rule in family.fused for member in rule.members}
        self.siblings = {name: names[0] for names in family.siblings for name in names}
        self.ignored: dict[str, str] = {}
        self.blocks: list[Block] = []

    def layout(self, architecture: str, guesses: tuple[str, ...]) -> Layout:
        model, config = self.meta_model.model, self.meta_model.config
        embedding_module = model.get_input_embeddings()
        embedding = tuple(
            self.names.tensor(f"{path}.{name}")
            for path in self.meta_model.entry
            for name, _ in model.get_submodule(path).named_parameters(recurse=False)
        )
        pixels = self._vision()
        for index, layer in enumerate(self.meta_model.layers):
            self._add(BlockKind.DECODER, f"{self.meta_model.blocks_path}.{index}", layer, self.kept[index])
        self._draft()
        head = self._head(embedding)
        copied = self._copied({*embedding, *pixels, *head})
        layout = Layout(
            architecture=architecture,
            family=self.family.name,
            blocks=tuple(self.blocks),
            embedding=embedding,
            pixels=pixels,
            head=head,
            ignored=self.ignored,
            guesses=(*guesses, *copied),
            aliases=self.family.aliases,
            hidden_size=embedding_module.weight.shape[1],
            vocab_size=embedding_module.weight.shape[0],
            image_token=getattr(config, "image_token_id", None) if pixels else None,
            top_k=getattr(config.get_text_config(), "num_experts_per_tok", 0),
            tied=self._tied(),
        )
        if not layout.groups:
            raise InputError(f"{self.meta_model.blocks_path} has no Linear that could be quantized; is it the decoder?")
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
                found.append(self._tensor(f"{vision.tower}.{entry}.{name}", tuple(tensor.shape)))
            self._matrices(f"{vision.tower}.{entry}", module, relative=entry)
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
        parameters = {
            self.names.tensor(name): tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if (tower is None or not name.startswith(tower)) and self.names.runs(name.rpartition(".")[0])
        }
        for name, shape in parameters.items():
            self._tensor(name, shape)
        head = tuple(name for name in parameters if name not in embedding)
        output = model.get_output_embeddings()
        tied = output is not None and output.weight is model.get_input_embeddings().weight
        refused = "it is tied to the embedding, which is never quantized" if tied else self.reasons.get("lm_head")
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

    def _outside(self, path: str, module: nn.Module, refused: str | None) -> str:
        """Why a matrix outside the blocks stays."""
        if isinstance(module, nn.Embedding):
            return "embedding: never quantized"
        if path in self.meta_model.entry:
            return "before the first layer: only blocks and the output head are measured"
        if module is not self.meta_model.model.get_output_embeddings() and not self.names.runs(path):
            return _TOWER
        return refused or "output head: model.quantize_lm_head is not set"

    def _tied(self) -> tuple[str, str] | None:
        """Embedding and output head, where they are one by the configuration and two in the checkpoint."""
        model = self.meta_model.model
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        if output is None or output.weight is not embedding.weight:
            return None
        names = {id(module): self.names.tensor(f"{path}{_WEIGHT}") for path, module in model.named_modules()}
        pair = names[id(embedding)], names[id(output)]
        return pair if self.checkpoint.tensors.keys() >= {*pair} else None

    def _add_head(self, path: str, module: nn.Linear) -> None:
        name = self.names.module(path)
        linear = LinearSpec(
            name=name,
            out_features=module.out_features,
            in_features=module.in_features,
            sources=(f"{name}{_WEIGHT}",),
        )
        matrix = Matrix(name=name, input=name, linears=(linear,), parameters=(f"{path}{_WEIGHT}",))
        self._append(BlockKind.HEAD, "", self._parameters("", nn.ModuleDict({path: module})), (matrix,))

    def _copied(self, loaded: set[str]) -> tuple[str, ...]:
        """Mark the tensors that no part of the model loads as copied; a note about them."""
        loaded |= {tensor for block in self.blocks for tensor in block.tensors}
        towers = self.names.tensors_of_towers()
        for name in towers:
            if name not in loaded and len(self.checkpoint.tensors[name].shape) > 1:
                self.ignored.setdefault(name.removesuffix(_WEIGHT), _TOWER)
        loaded |= towers
        known = [f"{name}." for name in self.ignored]
        left = [
            name
            for name in self.checkpoint.tensors
            if name not in loaded and not any(name.startswith(prefix) for prefix in known)
        ]
        for name in left:
            if len(self.checkpoint.tensors[name].shape) > 1:
                self.ignored[name.removesuffix(_WEIGHT)] = "not loaded by transformers; copied as it is"
        if not left:
            return ()
        return (f"{len(left)} tensors, {left[0]} the first, are not loaded by transformers and are copied as they are",)

    # One block ------------------------------------------------------------------------------------------------

    def _add(self, kind: BlockKind, prefix: str, module: nn.Module, kept: Mapping[str, str] | None = None) -> None:
        self._append(kind, prefix, self._parameters(prefix, module), self._matrices(prefix, module, kept=kept or {}))

    def _append(
        self, kind: BlockKind, prefix: str, parameters: tuple[Parameter, ...], matrices: Sequence[Matrix]
    ) -> None:
        found: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            # All projections of all experts of a layer are one item.
            name = matrix.name if matrix.experts is None else matrix.name.rpartition(".")[0]
            found.setdefault(name, []).append(matrix)
        block = Block(
            index=len(self.blocks),
            kind=kind,
            prefix=prefix,
            parameters=parameters,
            groups=tuple(FusedGroup(name=name, matrices=tuple(members)) for name, members in found.items()),
            source_bytes=sum(
                self.checkpoint.tensors[tensor].nbytes for parameter in parameters for tensor in parameter.tensors
            ),
        )
        self.blocks.append(block)

    def _parameters(self, prefix: str, module: nn.Module) -> tuple[Parameter, ...]:
        packed = {f"{path}." if path else "": entry for path, entry in module.named_modules() if is_packed(entry)}
        found = []
        for name, tensor in module.state_dict(keep_vars=True).items():
            path, _, leaf = name.rpartition(".")
            full = self.names.tensor(f"{prefix}.{name}" if prefix else name)
            if f"{path}." in packed and full not in self.checkpoint.tensors and tensor.ndim == 3:
                experts = self.names.module(f"{prefix}.{path}" if prefix else path)
                tensors = self._unpacked(experts, leaf, tuple(tensor.shape))
            else:
                tensors = (self._tensor(full, tuple(tensor.shape)),)
            found.append(Parameter(name=name, tensors=tensors))
        return tuple(found)

    def _unpacked(self, experts: str, leaf: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The tensors of a packed parameter that is stored expert by expert, in the order of its rows."""
        names = self.family.experts
        members = (names.gate, names.up) if leaf == "gate_up_proj" else (names.down,)
        rows = shape[1] // len(members)
        return tuple(
            self._tensor(f"{experts}.{expert}.{member}{_WEIGHT}", (rows, shape[2]))
            for expert in range(shape[0])
            for member in members
        )

    def _matrices(
        self, prefix: str, module: nn.Module, relative: str = "", kept: Mapping[str, str] = MappingProxyType({})
    ) -> list[Matrix]:
        """Matrices that may be quantized; every other matrix is ignored, with the reason."""
        found: dict[str, list[tuple[LinearSpec, str]]] = {}
        experts: list[Matrix] = []
        paths = {path for path, entry in module.named_modules() if isinstance(entry, nn.Linear)}
        for path, entry in module.named_modules():
            inside = ".".join(part for part in (relative, path) if part)
            name = self.names.module(".".join(part for part in (prefix, path) if part))
            shapes = [parameter.ndim for parameter in entry.parameters(recurse=False)]
            if not any(ndim > 1 for ndim in shapes):
                continue
            leaf = path.rpartition(".")[2]
            reason = self.reasons.get(inside, self.reasons.get(leaf, kept.get(path)))
            if reason is None and is_packed(entry):
                reason = unquantizable(entry) or self.names.strange_stack(
                    ".".join(part for part in (prefix, path) if part)
                )
            elif reason is None and not isinstance(entry, nn.Linear):
                reason = NOT_A_LINEAR
            if reason is not None:
                self.ignored[name] = reason
            elif is_packed(entry):
                experts += self._experts(name, path, entry)
            else:
                parent = name.rpartition(".")[0]
                # A rule holds where all its members are: one of them alone is a matrix by itself.
                rule = self.rule_of.get(leaf)
                if rule is not None and not {f"{path.removesuffix(leaf)}{each}" for each in rule.members} <= paths:
                    rule = None
                linear = LinearSpec(
                    name=name,
                    out_features=entry.out_features,
                    in_features=entry.in_features,
                    sources=(f"{name}{_WEIGHT}",),
                )
                found.setdefault(f"{parent}.{rule.name}" if rule else name, []).append((linear, f"{path}{_WEIGHT}"))
        dense = [self._dense(name, members) for name, members in found.items()]
        return [*dense, *experts]

    def _dense(self, name: str, members: list[tuple[LinearSpec, str]]) -> Matrix:
        parent, dot, leaf = name.rpartition(".")
        return Matrix(
            name=name,
            input=f"{parent}{dot}{self.siblings.get(leaf, leaf)}",
            linears=tuple(linear for linear, _ in members),
            parameters=tuple(parameter for _, parameter in members),
        )

    def _experts(self, name: str, path: str, module: Any) -> list[Matrix]:
        """gate/up and down of every expert."""
        names = self.family.experts
        matrices = []
        for leaf, members in (("gate_up_proj", (names.gate, names.up)), ("down_proj", (names.down,))):
            experts, rows, columns = getattr(module, leaf).shape
            packed = f"{name}.{leaf}"
            linears = tuple(
                LinearSpec(
                    name=f"{name}.{EXPERT}.{member}",
                    out_features=rows // len(members),
                    in_features=columns,
                    experts=experts,
                    sources=(packed,)
                    if packed in self.checkpoint.tensors
                    else tuple(f"{name}.{expert}.{member}{_WEIGHT}" for expert in range(experts)),
                )
                for member in members
            )
            parameter = f"{path}.{leaf}" if path else leaf
            matrices.append(Matrix(name=packed, input=packed, linears=linears, parameters=(parameter,)))
        return matrices

    # Names ----------------------------------------------------------------------------------------------------

    def _ignore_tensors(self, prefix: str, reason: str) -> None:
        for name, info in self.checkpoint.tensors.items():
            if name.startswith(f"{prefix}.") and len(info.shape) > 1:
                self.ignored[name.removesuffix(_WEIGHT)] = reason

    def _tensor(self, name: str, shape: tuple[int, ...]) -> str:
        """The name; InputError unless the checkpoint has it in this shape."""
        info = tensor_info(self.checkpoint, name)
        if info.shape != shape:
            raise InputError(
                f"{self.checkpoint.store.uri}: {name} has shape {info.shape}, the configuration says {shape}; "
                "config.json and the weights do not belong together"
            )
        return name
