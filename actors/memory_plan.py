"""The memory plan of a run, from its layout alone: memory of a worker, disk of the run store and the repository."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.schedule.shards import blocks_per_shard
from prismaquant_ray.backward.loss import GPU_LOGIT_BYTES, LOGIT_BYTES
from prismaquant_ray.config import Config
from prismaquant_ray.copies import PIECE_BYTES, PIECES
from prismaquant_ray.evaluation.variants import Variant
from prismaquant_ray.events import Machine
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.formatting import gigabytes
from prismaquant_ray.forward.block import hessian_bytes
from prismaquant_ray.forward.encode import AT_ONCE
from prismaquant_ray.forward.routed_inputs import HESSIANS
from prismaquant_ray.layout import HEADS, Block, BlockKind, Layout

# torch, transformers, Ray's worker and the calibration tokens of one process; and CUDA's libraries, which nobody has
# measured here, with the ring that copies pass.
BASE_BYTES = 700_000_000
_GPU_BASE_BYTES = BASE_BYTES + 2_000_000_000 + PIECES * PIECE_BYTES
# Logits of one piece, their softmax, its cumulative sum and their gradient.
_EXIT_COPIES = 6
# Float32 copies of a fused group while it is rounded: stacked weights, three attempts and their errors, codes.
_ROUNDING_COPIES = 8
# Bytes per weight of a fused group while it is rounded: three attempts and the codes, one byte each.
_COMPACT_COPIES = 4
# Training and held-out Hessians of some experts, and temporaries of their factorization.
_HESSIAN_COPIES = 5
# Boundaries of a microbatch in flight: four to be written, two to be read, one in and one out; on a GPU the last two.
_BOUNDARIES = 8
_GPU_BOUNDARIES = 2
# A block's candidates on their way from a GPU to the store: those of two blocks in pinned memory, which is allocated in
# powers of two, and what of one is being written.
_LEAVING = 2 * 2 + 1

# Embedding and head, as they are read and as tensors.
_HEADS_READ = 3
#: What to do when a worker's memory is not enough.
ADVICE = (
    "lower calibration.microbatch, calibration.length or cluster.workers, name fewer formats, or use devices with more "
    "memory"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Bytes of one memory that a worker takes: `fixed`, and `block` for each block it loads at a time, or `exit`."""

    fixed: int
    block: int
    exit: int = 0

    def peak(self, blocks: int) -> int:
        """With `blocks` blocks at a time."""
        return self.fixed + max(blocks * self.block, self.exit)

    def fitting(self, free: int) -> int:
        """Blocks that fit into `free` bytes."""
        return (free - self.fixed) // self.block


@dataclass(frozen=True, kw_only=True, slots=True)
class Free:
    """Bytes that a worker may take: where it computes, and of the host beside a GPU with a memory of its own."""

    memory: int
    host: int | None = None
    gpu: bool = False

    @classmethod
    def of(cls, machine: Machine, sharing: int) -> Free:
        """Of one of `sharing` workers on a machine."""
        if machine.device == "cpu":
            return cls(memory=machine.free_bytes // sharing)
        host = machine.host_free_bytes
        return cls(memory=machine.free_bytes, host=None if host is None else host // sharing, gpu=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes. `block_*` count once per loaded block, for the largest block; the rest once per worker.

    A worker on a CPU has one memory: `base` is its process; `working` encoding one block, reading another and moving
    boundaries; `exit` final norm, head and logits, or a draft or output head, while no other block is loaded. A GPU's
    worker takes `device` of its memory and `host` beside it. `candidate_bytes` and `boundary` (the output of one block
    for all tokens) are in the run store.
    """

    base: int
    working: int
    exit: int
    block_weights: int
    block_hessians: int
    block_candidates: int
    block_activations: int
    device: Room
    host: Room
    blocks: int
    candidate_bytes: int
    boundary: int
    repository: int

    @property
    def block(self) -> int:
        """One loaded block: the forward pass holds Hessians, the backward pass candidates and activations.

        While a shard is finished, without activations by then, the following one is read.
        """
        weights, candidates = self.block_weights, self.block_candidates
        finishing = 2 * weights + self.block_hessians, 2 * (weights + candidates)
        return max(*finishing, weights + candidates + self.block_activations)

    @property
    def cpu(self) -> Room:
        """The memory of a worker on a CPU."""
        return Room(fixed=self.base + self.working, block=self.block, exit=self.exit)

    @property
    def shared(self) -> Room:
        """The one memory of a GPU and its CPU on a chip that has no other."""
        device, host = self.device, self.host
        return Room(fixed=device.fixed + host.fixed, block=device.block + host.block, exit=device.exit + host.exit)

    def rooms(self, free: Free) -> dict[str, tuple[Room, int]]:
        """What a worker takes and has of each memory, by its name."""
        if not free.gpu:
            return {"memory": (self.cpu, free.memory)}
        if free.host is None:
            return {"memory of GPU and CPU": (self.shared, free.memory)}
        return {"GPU memory": (self.device, free.memory), "host memory": (self.host, free.host)}

    def room(self, free: Free) -> Room:
        """What a worker takes of the memory where it computes."""
        return next(room for room, _ in self.rooms(free).values())

    def fitting(self, free: Free) -> int:
        """Blocks that fit."""
        return min(room.fitting(have) for room, have in self.rooms(free).values())

    def lacking(self, free: Free) -> str | None:
        """What is missing for one block at a time; None when nothing is."""
        short = [
            f"{gigabytes(room.peak(1))} of {name}, {gigabytes(have)} are free"
            for name, (room, have) in self.rooms(free).items()
            if room.peak(1) > have
        ]
        return "; ".join(short) or None

    def run_store(self, blocks: int) -> int:
        """Most bytes in the run store with shards of `blocks` blocks: boundaries, some gradients, candidates."""
        return (math.ceil(self.blocks / blocks) + 3) * self.boundary + self.candidate_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSize:
    """Blocks that a worker loads at a time, and why: how many fit into what is free, how many keep all workers busy."""

    blocks: int
    free: Free
    fitting: int
    wanted: int
    configured: bool


def shard_size(plan: MemoryPlan, config: Config, *, workers: int, free: Free) -> ShardSize:
    """`cluster.blocks_per_shard`, or as many blocks as fit into what a worker may take and keep all workers busy.

    `cluster.memory`, when it is set, takes the place of the memory where a worker computes.
    """
    if config.cluster.memory != "auto":
        free = replace(free, memory=config.cluster.memory)
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
    # A weight with factors, beside the one without them.
    folded = max(min(each.parameters, AT_ONCE) if each.experts else each.parameters for each in layout.linears())
    has_experts = any(group.experts for group in layout.groups)
    hop = calibration.microbatch * calibration.length * layout.row_width * compute
    vocabulary = layout.vocab_size * layout.hidden_size * compute
    head = max(
        (
            _held(block, layout, config, compute).total + (vocabulary if block.kind is BlockKind.DRAFT else 0)
            for block in layout.of(*HEADS)
        ),
        default=0,
    )
    exits = [
        vocabulary + _EXIT_COPIES * min(logits, 4 * calibration.length * layout.vocab_size) + head
        for logits in (LOGIT_BYTES, GPU_LOGIT_BYTES)
    ]
    candidates = max(candidate_bytes([block], config.formats) for block in chain)
    reading = max(block.source_bytes + candidate_bytes([block], config.formats) for block in chain)
    encoding = (
        3 * 4 * widest**2
        + _ROUNDING_COPIES * 4 * min(largest, AT_ONCE)
        + _COMPACT_COPIES * largest
        + (compute * folded if config.rounding.equalize else 0)
        + (_HESSIAN_COPIES * 4 * HESSIANS if has_experts else 0)
    )
    return MemoryPlan(
        base=BASE_BYTES,
        working=reading + encoding + _BOUNDARIES * hop,
        exit=exits[0],
        block_weights=held.weights,
        block_hessians=held.hessians,
        block_candidates=held.candidates,
        block_activations=held.activations,
        device=Room(fixed=encoding + _GPU_BOUNDARIES * hop, block=held.total, exit=exits[1]),
        host=Room(
            fixed=_GPU_BASE_BYTES + reading + _LEAVING * candidates + _BOUNDARIES * hop,
            block=held.weights + candidates,
            exit=_HEADS_READ * vocabulary,
        ),
        blocks=len(layout.blocks),
        candidate_bytes=candidate_bytes(layout.blocks, config.formats),
        boundary=calibration.sequences * calibration.length * layout.row_width * compute,
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
    hop = (1 + len(variants)) * tokens * layout.row_width * compute
    vocabulary = layout.vocab_size * layout.hidden_size * compute
    heads = 2 if any(variant.choice is None for variant in variants) else 1
    reading = max(block.source_bytes for block in chain)
    activations = max(
        4 * tokens * (4 * layout.row_width + sum(linear.in_features + linear.out_features for linear in b.linears))
        for b in chain
    )
    # Logits of one piece in float64, of the source and of one variant.
    piece = _EXIT_COPIES * 2 * min(GPU_LOGIT_BYTES, 4 * length * layout.vocab_size)
    return MemoryPlan(
        base=BASE_BYTES,
        working=reading + 4 * group + _BOUNDARIES * hop,
        exit=heads * vocabulary + _EXIT_COPIES * 2 * LOGIT_BYTES,
        block_weights=largest * compute,
        block_hessians=0,
        block_candidates=largest * copies,
        block_activations=activations,
        device=Room(
            fixed=4 * group + _GPU_BOUNDARIES * hop,
            block=largest * (compute + copies) + activations,
            exit=heads * vocabulary + piece,
        ),
        host=Room(
            fixed=_GPU_BASE_BYTES + heads * reading + _BOUNDARIES * hop,
            block=largest * (compute + copies),
            exit=heads * _HEADS_READ * vocabulary,
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
    per_token = 4 * layout.row_width + sum(
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
