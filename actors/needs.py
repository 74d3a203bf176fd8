"""What a run will need, from its layout alone: memory of a worker, disk of the run store and the repository."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from actors.shards import blocks_per_shard
from prismaquant_ray.config import Config
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.layout import Block, Layout
from prismaquant_ray.rounding.forward_pass import hessian_bytes
from prismaquant_ray.sensitivity.fisher import LOGIT_BYTES

# torch, transformers, Ray's worker and the calibration tokens of one process.
BASE_BYTES = 700_000_000
# Logits of one piece, their softmax, its cumulative sum and their gradient.
_EXIT_COPIES = 6
# Float32 copies of a fused group while it is rounded: stacked weights, three attempts and their errors, codes.
_ROUNDING_COPIES = 8
# Boundaries of a microbatch in flight: four to be written, two to be read, one in and one out.
_BOUNDARIES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes. `block_*` are taken by each loaded block of the largest kind, the rest of a worker once.

    `base` is the process, `working` what encoding one block and moving boundaries take, `exit` final norm, head and
    logits while no block is loaded. `candidate_bytes` and `boundary` (all tokens, one place) are for the run store.
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

    @property
    def block(self) -> int:
        """Of one loaded block: the forward pass holds Hessians, the backward pass candidates and activations."""
        return self.block_weights + max(self.block_hessians, self.block_candidates + self.block_activations)

    def worker(self, blocks: int) -> int:
        """Peak of a worker that holds `blocks` blocks at a time."""
        return self.base + self.working + max(blocks * self.block, self.exit)

    def fitting(self, free: int) -> int:
        """Blocks that fit into `free` bytes."""
        return (free - self.base - self.working) // self.block

    def run_store(self, blocks: int) -> int:
        """Most bytes in the run store with shards of `blocks` blocks: boundaries, some gradients, candidates."""
        return (math.ceil(self.blocks / blocks) + 3) * self.boundary + self.candidate_bytes

    def as_dict(self) -> dict[str, int]:
        """Every figure, by name."""
        return {**asdict(self), "block": self.block}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSize:
    """How many blocks a worker loads at a time, and why: what fits into `free` bytes, what the schedule wants."""

    blocks: int
    free: int
    fitting: int
    wanted: int
    configured: bool


def shard_size(needs: Needs, config: Config, *, workers: int, free: int) -> ShardSize:
    """`cluster.blocks_per_shard`, or as many blocks as fit into `free` bytes of a worker and keep all workers busy.

    `cluster.memory`, when it is set, takes the place of `free`.
    """
    if config.cluster.memory != "auto":
        free = config.cluster.memory
    fitting = needs.fitting(free)
    wanted = blocks_per_shard(blocks=needs.blocks, workers=workers, fitting=needs.blocks)
    configured = config.cluster.blocks_per_shard
    if configured != "auto":
        return ShardSize(blocks=configured, free=free, fitting=fitting, wanted=wanted, configured=True)
    chosen = blocks_per_shard(blocks=needs.blocks, workers=workers, fitting=fitting)
    return ShardSize(blocks=chosen, free=free, fitting=fitting, wanted=wanted, configured=False)


def needs(layout: Layout, config: Config, *, repository_bytes: int) -> Needs:
    """The plan `inspect` prints and a run is checked against."""
    compute = 4 if config.model.dtype == "float32" else 2
    calibration = config.calibration
    tokens = calibration.microbatch * calibration.length
    block = max(layout.blocks, key=lambda block: block.source_bytes)
    parameters = sum(linear.parameters for linear in block.linears)
    widest = max(group.in_features for b in layout.blocks for group in b.inputs)
    largest = max(group.parameters for b in layout.blocks for group in b.groups)
    # Inputs and outputs of every Linear are held until gradients arrive, with the rounded input and one error.
    per_token = sum(linear.in_features + 2 * linear.out_features for linear in block.linears) + 4 * widest
    hop = tokens * layout.hidden_size * compute
    return Needs(
        base=BASE_BYTES,
        working=block.source_bytes + 3 * 4 * widest**2 + _ROUNDING_COPIES * 4 * largest + _BOUNDARIES * hop,
        exit=layout.vocab_size * layout.hidden_size * compute
        + _EXIT_COPIES * min(LOGIT_BYTES, 4 * calibration.length * layout.vocab_size),
        block_weights=parameters * compute,
        block_hessians=sum(hessian_bytes(group) for group in block.inputs),
        block_candidates=len(codecs_of(config.formats)) * parameters * 4,
        block_activations=tokens * per_token * 4,
        blocks=len(layout.blocks),
        candidate_bytes=candidate_bytes(layout.blocks, config.formats),
        boundary=calibration.sequences * calibration.length * layout.hidden_size * compute,
        repository=repository_bytes,
    )


def candidate_bytes(blocks: Sequence[Block], formats: Sequence[FormatName]) -> int:
    """Bytes of every stored candidate."""
    total = 0
    for block in blocks:
        for linear in block.linears:
            for name in formats:
                spec = FORMATS[name]
                if spec.codec is not None and spec.refusal(linear.out_features, linear.in_features) is None:
                    total += spec.weight_bytes(linear.out_features, linear.in_features) + spec.extra_bytes()
    return total
