"""The memory plan of a run, from its layout alone: memory of a worker, disk of the run store and the repository."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.schedule.shards import blocks_per_shard
from prismaquant_ray.backward.loss import LOGIT_BYTES
from prismaquant_ray.config import Config
from prismaquant_ray.evaluation.variants import Variant
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.forward.block import hessian_bytes
from prismaquant_ray.forward.encode import AT_ONCE
from prismaquant_ray.forward.routed_inputs import HESSIANS
from prismaquant_ray.layout import HEADS, Block, BlockKind, Layout

# torch, transformers, Ray's worker and the calibration tokens of one process.
BASE_BYTES = 700_000_000
# Logits of one piece, their softmax, its cumulative sum and their gradient.
_EXIT_COPIES = 6
# Float32 copies of a fused group while it is rounded: stacked weights, three attempts and their errors, codes.
_ROUNDING_COPIES = 8
# Bytes per weight of a fused group while it is rounded: three attempts and the codes, one byte each.
_COMPACT_COPIES = 4
# Training and held-out Hessians of some experts, and temporaries of their factorization.
_HESSIAN_COPIES = 5
# Boundaries of a microbatch in flight: four to be written, two to be read, one in and one out.
_BOUNDARIES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes. `block_*` count once per loaded block, for the largest block; the rest once per worker.

    `base`: the process. `working`: encoding one block and moving boundaries. `exit`: final norm, head and logits, or a
    draft or output head, while no other block is loaded. `candidate_bytes` and `boundary` (the output of one block for
    all tokens) are in the run store.
    """

    base: int
    working: int
    exit: int
    block_weights: int
    block_hessians: int
    block_candidates: int
    block_activations: int
    blocks: int
    candidate_bytes: int
    boundary: int
    repository: int
    block: int = field(init=False)

    def __post_init__(self) -> None:
        """One loaded block: the forward pass holds Hessians, the backward pass candidates and activations.

        While a shard is finished, without activations by then, the following one is read.
        """
        weights, candidates = self.block_weights, self.block_candidates
        finishing = 2 * weights + self.block_hessians, 2 * (weights + candidates)
        object.__setattr__(self, "block", max(*finishing, weights + candidates + self.block_activations))

    def worker(self, blocks: int) -> int:
        """Peak of a worker that holds `blocks` blocks at a time."""
        return self.base + self.working + max(blocks * self.block, self.exit)

    def fitting(self, free: int) -> int:
        """Blocks that fit into `free` bytes."""
        return (free - self.base - self.working) // self.block

    def run_store(self, blocks: int) -> int:
        """Most bytes in the run store with shards of `blocks` blocks: boundaries, some gradients, candidates."""
        return (math.ceil(self.blocks / blocks) + 3) * self.boundary + self.candidate_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSize:
    """Blocks that a worker loads at a time, and why: how many fit into `free` bytes, how many keep all workers busy."""

    blocks: int
    free: int
    fitting: int
    wanted: int
    configured: bool


def shard_size(plan: MemoryPlan, config: Config, *, workers: int, free: int) -> ShardSize:
    """`cluster.blocks_per_shard`, or as many blocks as fit into `free` bytes of a worker and keep all workers busy.

    `cluster.memory`, when it is set, takes the place of `free`.
    """
    if config.cluster.memory != "auto":
        free = config.cluster.memory
    fitting = plan.fitting(free)
    wanted = blocks_per_shard(blocks=plan.blocks, workers=workers, fitting=plan.blocks)
    configured = config.cluster.blocks_per_shard
    if configured != "auto":
        return ShardSize(blocks=configured, free=free, fitting=fitting, wanted=wanted, configured=True)
    chosen = blocks_per_shard(blocks=plan.blocks, workers=workers, fitting=fitting)
    return ShardSize(blocks=chosen, free=free, fitting=fitting, wanted=wanted, configured=False)


def memory_plan(layout: Layout, config: Config, *, repository_bytes: int) -> MemoryPlan:
    """The plan `inspect` prints and a run is checked against."""
    compute = config.model.bytes_per_value
    calibration = config.calibration
    chain = [block for block in layout.blocks if block.kind not in HEADS]
    held = max((_held(block, layout, config, compute) for block in chain), key=lambda held: held.total)
    dense = [entry.in_features for b in layout.blocks for entry in b.inputs if entry.experts is None]
    widest = max(dense, default=0)
    # Experts are rounded some at a time, a large matrix by rows.
    largest = max(min(group.parameters, AT_ONCE) if group.experts else group.parameters for group in layout.groups)
    has_experts = any(group.experts for group in layout.groups)
    hop = calibration.microbatch * calibration.length * layout.hidden_size * compute
    vocabulary = layout.vocab_size * layout.hidden_size * compute
    exit_bytes = vocabulary + _EXIT_COPIES * min(LOGIT_BYTES, 4 * calibration.length * layout.vocab_size)
    heads = [
        _held(block, layout, config, compute).total + exit_bytes + (vocabulary if block.kind is BlockKind.DRAFT else 0)
        for block in layout.of(*HEADS)
    ]
    return MemoryPlan(
        base=BASE_BYTES,
        working=max(block.source_bytes + candidate_bytes([block], config.formats) for block in chain)
        + 3 * 4 * widest**2
        + _ROUNDING_COPIES * 4 * min(largest, AT_ONCE)
        + _COMPACT_COPIES * largest
        + _BOUNDARIES * hop
        + (_HESSIAN_COPIES * 4 * HESSIANS if has_experts else 0),
        exit=max([exit_bytes, *heads]),
        block_weights=held.weights,
        block_hessians=held.hessians,
        block_candidates=held.candidates,
        block_activations=held.activations,
        blocks=len(layout.blocks),
        candidate_bytes=candidate_bytes(layout.blocks, config.formats),
        boundary=calibration.sequences * calibration.length * layout.hidden_size * compute,
        repository=repository_bytes,
    )


def evaluation_memory_plan(layout: Layout, config: Config, length: int, variants: Sequence[Variant]) -> MemoryPlan:
    """The plan of an evaluation: weights once in the compute dtype, and once as each format decodes them."""
    compute = config.model.bytes_per_value
    formats = {name for variant in variants for name in (variant.choice or {}).values()}
    # A repository's blocks are loaded beside the source's.
    copies = 2 * len(codecs_of([*formats])) + (compute if any(v.choice is None for v in variants) else 0)
    tokens = config.calibration.microbatch * length
    chain = [block for block in layout.blocks if block.kind not in HEADS]
    largest = max(sum(linear.parameters for linear in block.linears) for block in chain)
    group = max(group.parameters for group in layout.groups)
    hop = (1 + len(variants)) * tokens * layout.hidden_size * compute
    vocabulary = layout.vocab_size * layout.hidden_size * compute
    heads = 2 if any(variant.choice is None for variant in variants) else 1
    return MemoryPlan(
        base=BASE_BYTES,
        working=max(block.source_bytes for block in chain) + 4 * group + _BOUNDARIES * hop,
        # Logits of one piece in float64, of the source and of one variant.
        exit=heads * vocabulary + _EXIT_COPIES * 2 * LOGIT_BYTES,
        block_weights=largest * compute,
        block_hessians=0,
        block_candidates=largest * copies,
        block_activations=max(
            4
            * tokens
            * (4 * layout.hidden_size + sum(linear.in_features + linear.out_features for linear in b.linears))
            for b in chain
        ),
        blocks=len(chain),
        candidate_bytes=0,
        boundary=hop,
        repository=0,
    )


@dataclass(frozen=True, slots=True)
class _Held:
    """Bytes of one loaded block: its weights, Hessians of the forward pass, and the rest of the backward pass."""

    weights: int
    hessians: int
    candidates: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + max(self.hessians, self.candidates + self.activations)


def _held(block: Block, layout: Layout, config: Config, compute: int) -> _Held:
    calibration = config.calibration
    parameters = sum(linear.parameters for linear in block.linears)
    has_experts = any(linear.experts for linear in block.linears)
    # All experts together read one hidden state per token, which is kept until they are rounded.
    kept = calibration.sequences * calibration.length * layout.hidden_size * compute if has_experts else 0
    # Inputs and outputs are held until gradients arrive, with the rounded input and one error; a token is routed to
    # top_k experts. An output head holds one piece of logits at a time.
    per_token = 4 * layout.hidden_size + sum(
        (layout.top_k if linear.experts else 1) * 2 * (linear.in_features + linear.out_features)
        for linear in block.linears
        if block.kind is not BlockKind.HEAD
    )
    return _Held(
        weights=parameters * compute,
        hessians=kept + sum(hessian_bytes(entry) for entry in block.inputs),
        candidates=len(codecs_of(config.formats)) * parameters * 2,
        activations=calibration.microbatch * calibration.length * per_token * 4,
    )


def candidate_bytes(blocks: Sequence[Block], formats: Sequence[FormatName]) -> int:
    """Bytes of every stored candidate."""
    total = 0
    for block in blocks:
        for linear in block.linears:
            for name in formats:
                spec = FORMATS[name]
                if spec.codec is not None and spec.refusal(linear.out_features, linear.in_features) is None:
                    one = spec.weight_bytes(linear.out_features, linear.in_features) + spec.extra_bytes()
                    total += len(linear.names) * one
    return total
