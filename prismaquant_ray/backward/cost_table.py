"""The sensitivity of a whole model: one price for every fused group in every format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.backward.optimism import Optimism, optimism
from prismaquant_ray.block_records import BackwardRecord, ForwardRecord
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import BlockKind, FusedGroup, Layout

Objective = Literal["token_fisher", "fisher_trace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheCost:
    """Predicted loss increase of an FP8 KV cache in all layers, nats per token; `body` is that without a draft head."""

    cost: float
    standard_error: float
    body: float
    body_standard_error: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CostTable:
    """Predicted loss increase of every fused group in every format, nats per token.

    Row i is groups[i], column j is formats[j]; NaN marks a format the group cannot take. `standard_error` belongs
    to `token_fisher`. BF16 is the source and costs nothing, but where factors were folded into it: it is rounded once
    more, which `fisher_trace` prices as errors that are independent of everything. `optimism` is what the prices of
    rounded weights were multiplied by: they are taken on tokens that those were fitted to. `cache` is what an FP8 KV
    cache costs, None where a layer's cannot be rounded.
    """

    groups: tuple[str, ...]
    formats: tuple[FormatName, ...]
    token_fisher: NDArray[np.float64]
    fisher_trace: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    optimism: Mapping[FormatName, Optimism]
    cache: CacheCost | None = None

    def cost(self, objective: Objective) -> NDArray[np.float64]:
        """The table a plan minimises."""
        return self.token_fisher if objective == "token_fisher" else self.fisher_trace


def cost_table(
    layout: Layout,
    formats: Sequence[FormatName],
    forward: Mapping[int, ForwardRecord],
    backward: Mapping[int, BackwardRecord],
    *,
    draft_weight: float,
) -> CostTable:
    """Prices from each block's records, by block index.

    A draft head has its own loss; one nat of it counts as `draft_weight` nats of the model's.
    """
    shape = (len(layout.groups), len(formats))
    token, trace, error = (np.full(shape, np.nan) for _ in range(3))
    body = [block.index for block in layout.blocks if block.kind is not BlockKind.DRAFT]
    optimistic = optimism(formats, [backward[index] for index in body])
    for row, group in enumerate(layout.groups):
        block = layout.block_of[group.name]
        linears, prices = forward[block.index].linears, backward[block.index]
        weight = draft_weight if block.kind is BlockKind.DRAFT else 1.0
        for column, name in enumerate(formats):
            codec = FORMATS[name].codec
            if codec is None:
                token[row, column] = trace[row, column] = weight * _storing(group, forward[block.index], prices)
                error[row, column] = 0.0
                continue
            price = prices.groups[group.name].get(name)
            if price is None:
                continue
            token[row, column] = weight * (price.cost + (optimistic[name].factor - 1.0) * price.weight_cost)
            error[row, column] = weight * price.standard_error
            # Of experts both figures are lists, with an entry for each.
            trace[row, column] = (
                weight
                * 0.5
                * sum(
                    np.dot(prices.fisher_trace[item.name], linears[item.name][codec.name].weight_mse)
                    for item in group.linears
                )
            )
    return CostTable(
        groups=tuple(group.name for group in layout.groups),
        formats=tuple(formats),
        token_fisher=token,
        fisher_trace=trace,
        standard_error=error,
        optimism=optimistic,
        cache=_cache_cost(layout, backward, draft_weight),
    )


def _cache_cost(layout: Layout, backward: Mapping[int, BackwardRecord], draft_weight: float) -> CacheCost | None:
    """One item of the whole model: a server has one type of cache for all layers."""
    if layout.kept_cache is not None:
        return None
    priced = [
        (block.kind is BlockKind.DRAFT, backward[block.index].cache.get(attention.name))
        for block in layout.blocks
        for attention in block.attention
    ]
    found = [(drafts, price) for drafts, price in priced if price is not None]
    if len(found) < len(priced):
        return None
    weights = np.array([draft_weight if drafts else 1.0 for drafts, _ in found])
    body = np.array([not drafts for drafts, _ in found])
    costs, errors = (np.array([getattr(price, name) for _, price in found]) for name in ("cost", "standard_error"))
    return CacheCost(
        cost=math.fsum(weights * costs),
        standard_error=float(np.linalg.norm(weights * errors)),
        body=math.fsum(costs[body]),
        body_standard_error=float(np.linalg.norm(errors[body])),
    )


def _storing(group: FusedGroup, forward: ForwardRecord, prices: BackwardRecord) -> float:
    """What storing folded weights of a group in 16 bits costs."""
    return 0.5 * sum(
        float(np.vdot(prices.fisher_trace[linear.name], forward.storing[linear.name]))
        for linear in group.linears
        if linear.name in forward.storing
    )
