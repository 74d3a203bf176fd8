"""How long a job takes, from the rates of its workers: products of Linears, encoding, storage; no more is counted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from actors.diagnosis import Rates
from actors.memory_plan import MemoryPlan
from prismaquant_ray.config import Config
from prismaquant_ray.formats import codecs_of
from prismaquant_ray.layout import Block, BlockKind, Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """A stage in seconds: of computation, and of storage, which goes on beside it. The longer one bounds it."""

    stage: str
    compute: float
    storage: float

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return max(self.compute, self.storage)


def estimate(
    layout: Layout, config: Config, plan: MemoryPlan, rates: Sequence[Rates], *, blocks_per_shard: int
) -> list[StageTime]:
    """The stages of a first `quantize` by workers of these rates, one for each of them.

    Linears count with the tokens that reach them, Hessians as symmetric products, encoding by the weight. Attention,
    norms, starting processes and waiting for one another do not count.
    """
    tokens = config.calibration.sequences * config.calibration.length
    codecs = len(codecs_of(config.formats))
    active = sum(_active(block, layout) for block in layout.blocks)
    weights = sum(linear.parameters for block in layout.blocks for linear in block.linears)
    head = layout.vocab_size * layout.hidden_size
    products = sum(rate.products for rate in rates)
    encoding = sum(rate.encoding for rate in rates)
    stored = [1 / (1 / rate.write + 1 / rate.digest) for rate in rates]
    loaded = [1 / (1 / rate.read + 1 / rate.digest) for rate in rates]
    source = sum(block.source_bytes for block in layout.blocks)
    boundaries = plan.boundary * (len(layout.blocks) / blocks_per_shard + 1)
    # Rounded weights are what is multiplied a second time, by each codec; recomputing and gradients are one more each.
    backward = 2 * tokens * (active * (2 + codecs) + 2 * head)
    write, read = statistics.median(stored), statistics.median(loaded)
    return [
        StageTime(
            stage="forward pass",
            compute=(2 * tokens * active + _hessians(layout, tokens)) / products,
            storage=(source / sum(loaded)) + boundaries / sum(stored),
        ),
        StageTime(
            stage="encoding",
            compute=weights / encoding,
            storage=plan.candidate_bytes / sum(stored),
        ),
        StageTime(
            stage="backward pass",
            compute=backward / products,
            storage=(source + plan.candidate_bytes + boundaries) / sum(loaded) + boundaries / sum(stored),
        ),
        StageTime(stage="assembly", compute=0.0, storage=plan.repository * (1 / read + 1 / write)),
        StageTime(stage="verification", compute=0.0, storage=2 * plan.repository / read),
    ]


def _active(block: Block, layout: Layout) -> float:
    """Weights of a block that a token is multiplied by."""
    if block.kind is BlockKind.HEAD:
        return 0.0
    return sum(
        linear.out_features * linear.in_features * (layout.top_k if linear.experts else 1) for linear in block.linears
    )


def _hessians(layout: Layout, tokens: int) -> float:
    """FLOP of the second moments of every input."""
    inputs = [entry for block in layout.blocks for entry in block.inputs]
    # Those of experts are summed for all together, too.
    return sum(entry.in_features**2 * tokens * (2 * layout.top_k if entry.experts else 1) for entry in inputs)
