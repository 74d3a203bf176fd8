"""From a checkpoint's configuration and headers to its layout. No weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from prismaquant_ray.checkpoint.reader import Checkpoint
from prismaquant_ray.errors import InputError
from prismaquant_ray.layout import Block, FusedGroup, InputGroup, Layout, LinearSpec
from prismaquant_ray.models.families import Family, family_of
from prismaquant_ray.models.families.base import ATTENTION, GATED_MLP
from prismaquant_ray.models.skeleton import Skeleton


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration object of a checkpoint; InputError when transformers does not know it."""
    from transformers import CONFIG_MAPPING

    model_type = checkpoint.config.get("model_type")
    if "quantization_config" in checkpoint.config:
        raise InputError(f"{checkpoint.store.uri} is already quantized; start from the BF16 model")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{checkpoint.store.uri}: transformers does not know model_type {model_type!r}; update transformers "
            "or check config.json"
        )
    return CONFIG_MAPPING[model_type].from_dict(dict(checkpoint.config))


def architecture_of(checkpoint: Checkpoint) -> str:
    """The first entry of `architectures`."""
    names = checkpoint.config.get("architectures") or []
    if not names:
        raise InputError(f"{checkpoint.store.uri}: config.json names no architecture; add `architectures`")
    return str(names[0])


def build(checkpoint: Checkpoint) -> tuple[Skeleton, Layout]:
    """Skeleton and layout of a checkpoint; InputError when a tensor is missing or has another shape."""
    architecture = architecture_of(checkpoint)
    known = family_of(architecture)
    config = load_config(checkpoint)
    try:
        skeleton = Skeleton(config, blocks_path=known.blocks if known else None)
    except ValueError as error:
        raise InputError(f"{architecture}: transformers has no causal language model for it") from error
    guesses: tuple[str, ...] = ()
    family = known
    if family is None:
        family = Family(name="generic", architectures=(), blocks=skeleton.blocks_path, fused=(ATTENTION, GATED_MLP))
        guesses = (
            f"{architecture} has no family; its decoder is assumed to be {skeleton.blocks_path}",
            "q/k/v and gate/up projections are assumed to be fused by the runtime, everything else to stand alone",
        )
    return skeleton, layout_of(checkpoint, skeleton, architecture, family, guesses)


def layout_of(
    checkpoint: Checkpoint, skeleton: Skeleton, architecture: str, family: Family, guesses: tuple[str, ...]
) -> Layout:
    """Parse every module name once."""
    kept: dict[str, str] = {}
    blocks = tuple(
        _block(checkpoint, family, index, f"{skeleton.blocks_path}.{index}", layer, kept)
        for index, layer in enumerate(skeleton.layers)
    )
    model = skeleton.model
    embedding_module = model.get_input_embeddings()
    embedding = tuple(
        f"{path}.{name}"
        for path, module in model.named_modules()
        if module is embedding_module
        for name, _ in module.named_parameters(recurse=False)
    )
    head = tuple(name for name, _ in model.named_parameters() if name not in embedding)
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is embedding_module.weight
    if tied:
        head = (*head, *embedding)
    for name, parameter in model.named_parameters():
        _check_tensor(checkpoint, name, tuple(parameter.shape))
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kept[path] = "tied to the embedding" if tied else "output head: kept in source precision"
    return Layout(
        architecture=architecture,
        family=family.name,
        blocks=blocks,
        embedding=embedding,
        head=head,
        kept=kept,
        guesses=guesses,
        hidden_size=embedding_module.weight.shape[1],
        vocab_size=embedding_module.weight.shape[0],
    )


def _block(
    checkpoint: Checkpoint, family: Family, index: int, prefix: str, layer: nn.Module, kept: dict[str, str]
) -> Block:
    tensors = []
    for name, tensor in layer.state_dict(keep_vars=True).items():
        _check_tensor(checkpoint, f"{prefix}.{name}", tuple(tensor.shape))
        tensors.append(f"{prefix}.{name}")
    reasons = dict(family.kept)
    linears = []
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        name = f"{prefix}.{path}"
        reason = reasons.get(path.rpartition(".")[2])
        if reason is not None:
            kept[name] = reason
            continue
        linears.append(LinearSpec(name=name, out_features=module.out_features, in_features=module.in_features))
    if not linears:
        raise InputError(f"{prefix} has no Linear that could be quantized; is {family.blocks} the decoder?")
    return Block(
        index=index,
        prefix=prefix,
        tensors=tuple(tensors),
        inputs=input_groups(linears, family),
        source_bytes=sum(checkpoint.tensors[name].nbytes for name in tensors),
    )


def input_groups(linears: Sequence[LinearSpec], family: Family) -> tuple[InputGroup, ...]:
    """Group a block's Linears by the rules of its family, in order of first appearance."""
    rule_of = {member: rule for rule in family.fused for member in rule.members}
    members: dict[str, list[LinearSpec]] = {}
    for linear in linears:
        parent, _, leaf = linear.name.rpartition(".")
        rule = rule_of.get(leaf)
        members.setdefault(f"{parent}.{rule.name}" if rule else linear.name, []).append(linear)
    groups = (FusedGroup(name=name, linears=tuple(found)) for name, found in members.items())
    return tuple(InputGroup(name=group.name, groups=(group,)) for group in groups)


def _check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise InputError(f"{checkpoint.store.uri}: tensor {name} is missing; the checkpoint is incomplete")
    if info.shape != shape:
        raise InputError(
            f"{checkpoint.store.uri}: {name} has shape {info.shape}, the configuration says {shape}; "
            "config.json and the weights do not belong together"
        )
