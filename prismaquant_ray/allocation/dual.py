"""The Lagrangian dual of a plan under several limits: a price for each, and the bound that the prices prove.

With prices p ≥ 0 for the limits L, Σ_g min_f (cost + p·use) − p·L is a lower bound of every plan within them (Geoffrion
1974, "Lagrangean relaxation for integer programming"). It is concave and piecewise linear in p, and every minimiser
gives a tangent: its use beyond the limits. The best price of one limit lies where two tangents meet, one that rises and
one that falls; it is found by their intersections, which end after finitely many steps. For several limits this is done
for the last one with the others maximised inside: there, the two tangents of the inner optimum are mixed so that the
inner limits are kept exactly, and the mixture's use of the outer resource is the outer tangent.

The best bound is that of the linear relaxation, in which a group may be split between formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from prismaquant_ray.allocation.limits import Limit, within
from prismaquant_ray.allocation.problem import AllocationProblem, Floats, Ints

__all__ = ["Dual", "Tangent"]

# Intersections settle after a few steps; this only guards against rounding that never does.
_STEPS = 50
_EPSILON = float(np.finfo(np.float64).eps)


class Tangent(NamedTuple):
    """The dual at some prices: its value in nats per token, and its slope in each price."""

    value: float
    prices: Floats  # (limits,) nats per token for the whole limit
    slope: Floats  # (limits,) use beyond the limit, as a share of it; of a mixture of minimisers


class Dual:
    """The best prices of the limits of a problem.

    Args:
        problem: costs; its sizes are one of the limits.
        limits: at least one.
        columns: any plan within all limits.

    Attributes:
        bound: no plan within the limits costs less, nats per token.
        prices: (limits,) nats per token for a unit of each limit's use.
        columns: the cheapest plan within all limits that was met.
    """

    def __init__(self, problem: AllocationProblem, limits: Sequence[Limit], columns: Ints) -> None:
        self._cost = np.where(problem.allowed, problem.cost, np.inf)
        self._rows = np.arange(len(problem.groups))
        self._limits = limits
        # Uses are taken as shares of their limits, so that prices are of one size.
        self._scale = np.array([max(1, limit.limit) for limit in limits], dtype=np.float64)
        self._units = np.stack([limit.use for limit in limits])
        self._use = self._units / self._scale[:, None, None]
        self._most = np.array([limit.limit for limit in limits], dtype=np.int64)
        self.columns, self._best = columns, self._cost_of(columns)
        found = self._maximum(len(limits) - 1, np.zeros(len(limits)))
        self.prices = found.prices / self._scale
        # Rounding must not lift the bound.
        rounding = 16 * _EPSILON * (np.abs(self._cost[self._rows, self.columns]).sum() + found.prices.sum())
        self.bound = min(found.value - float(rounding), self._best)

    def _cost_of(self, columns: Ints) -> float:
        return float(self._cost[self._rows, columns].sum())

    def _at(self, prices: Floats) -> Tangent:
        """Value and slope where every group takes its cheapest format at these prices."""
        priced = self._cost + np.tensordot(prices, self._use, 1)
        columns = priced.argmin(axis=1)
        # In whole units: a limit that is used up exactly has no slope.
        slope = (self._units[:, self._rows, columns].sum(axis=1) - self._most) / self._scale
        if self._cost_of(columns) < self._best and within(columns, self._limits):
            self.columns, self._best = columns, self._cost_of(columns)
        return Tangent(float(priced[self._rows, columns].sum() - prices @ (self._most / self._scale)), prices, slope)

    def _maximum(self, level: int, prices: Floats) -> Tangent:
        """The best prices of the first limits, up to `level`; the others keep theirs."""
        if level < 0:
            return self._at(prices)

        def at(price: float) -> Tangent:
            return self._maximum(level - 1, np.where(np.arange(len(prices)) == level, price, prices))

        low = at(0.0)
        if low.slope[level] <= 0:
            return low
        high = self._falling(level, low, at)
        for _ in range(_STEPS):
            if high.slope[level] >= 0:
                return high
            apart = low.slope[level] - high.slope[level]
            start, end = low.prices[level], high.prices[level]
            price = (high.value - low.value + low.slope[level] * start - high.slope[level] * end) / apart
            if not start < price < end:
                break
            met = low.value + low.slope[level] * (price - start)
            found = at(float(price))
            if found.value >= met - 1e-13 * abs(met):
                return _mixed(level, low, high, found)
            low, high = (found, high) if found.slope[level] > 0 else (low, found)
        return _mixed(level, low, high, max(low, high, key=lambda tangent: tangent.value))

    def _falling(self, level: int, rising: Tangent, at: Callable[[float], Tangent]) -> Tangent:
        """A price at which the dual no longer rises: there is one, because no value exceeds the cost of a plan."""
        found = rising
        for _ in range(_STEPS):
            reach = max(self._best - found.value, _EPSILON * abs(self._best)) / found.slope[level]
            found = at(max(2 * float(found.prices[level]), float(found.prices[level] + 1.01 * reach)))
            if found.slope[level] <= 0:
                break
        return found


def _mixed(level: int, low: Tangent, high: Tangent, found: Tangent) -> Tangent:
    """The optimum, with the slope of the mixture of two tangents that keeps the limit of this level exactly."""
    share = low.slope[level] / (low.slope[level] - high.slope[level])
    slope = (1 - share) * low.slope + share * high.slope
    slope[level] = 0.0
    return Tangent(found.value, found.prices, slope)
