"""What an FP8 KV cache costs, while the gradients of a block go by.

Notation: k_t and v_t are what an attention caches of token t, g the gradients of the loss with respect to them, which
come from every later query that attends to t, and Q the rounding of the cache. With
p_t = g_k · (Q(k_t) − k_t) + g_v · (Q(v_t) − v_t) the price is ½ Σ_t p_t² / N, as of every other item. Where values are
equalized, what is cached is v_t times its factors, and the gradient is divided by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from prismaquant_ray.backward.price import price_on, sums_of_squares
from prismaquant_ray.block_records import CachePrice, CacheScales
from prismaquant_ray.cache_rounding import round_cached, value_factors
from prismaquant_ray.factors import Equalization
from prismaquant_ray.layout import Block

#: Of a block whose cache is not priced.
NO_SCALES: Mapping[str, CacheScales] = MappingProxyType({})


class CachePricing:
    """Prices of a block's cache by attention, added up microbatch by microbatch. What is added up stays on the device.

    `scales` are those that its keys and values would be stored with, `equalization` the block's folds.
    """

    def __init__(
        self, block: Block, scales: Mapping[str, CacheScales], equalization: Equalization, device: torch.device
    ) -> None:
        self.scales = scales
        factors = {each.name: value_factors(each, equalization) for each in block.attention}
        self._factors = {name: each.to(device) for name, each in factors.items() if each is not None}
        # By microbatch, of every attention: Σ p² of each sequence (3, sequences), of both, of keys and of values alone.
        self._squares: dict[str, list[Tensor]] = {name: [] for name in scales}

    def add(
        self, cached: Mapping[str, tuple[Tensor, Tensor]], gradients: Sequence[Tensor], sequences: int
    ) -> list[Tensor]:
        """Add a microbatch of `sequences`, with the gradients at keys and values, in the order of `scales`.

        Returns p of every token (tokens,) of each attention, to be checked.
        """
        found = []
        for place, (name, scales) in enumerate(self.scales.items()):
            (key, value), (at_key, at_value) = cached[name], gradients[2 * place : 2 * place + 2]
            factors, scale = self._factors.get(name), scales.value
            if factors is not None and scales.folded_value is not None:
                factors, scale = factors.view(value.shape[1], 1, value.shape[3]), scales.folded_value
                value, at_value = value * factors, at_value / factors
            parts = torch.stack([cache_projection(key, at_key, scales.key), cache_projection(value, at_value, scale)])
            p = parts.sum(0)
            both = torch.cat([p.unsqueeze(0), parts])
            self._squares[name].append(sums_of_squares(both.view(3, sequences, -1)))
            found.append(p.flatten())
        return found

    def finish(self, tokens: int) -> dict[str, CachePrice]:
        """Prices per token of `tokens`."""
        prices: dict[str, CachePrice] = {}
        for name, squares in self._squares.items():
            found = price_on(torch.cat(squares, dim=-1).cpu() / 2, tokens)
            prices[name] = CachePrice(
                cost=found.cost,
                standard_error=found.standard_error,
                key_cost=found.weight_cost,
                value_cost=found.activation_cost,
            )
        return prices


def cache_projection(x: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """g · (Q(x) − x) of every token (sequences, tokens), for keys or values and g (sequences, heads, tokens, size)."""
    x = x.detach().float()
    return (round_cached(x, scale).sub_(x) * gradient.float()).sum((1, 3))
