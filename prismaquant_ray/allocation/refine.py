"""Gains on prices, learned from measured plans: where a price is wrong, it is wrong for a kind of group in a format.

Plans around the optimum are measured. With x_i the summed prices of plan i by feature (a kind of group in a format),
y_i its measured loss and θ the gains, y_i ≈ θ · x_i. All plans are measured on the same tokens, so differences to the
first plan have small errors, and θ is the minimum of

    Σ_i ((y_i − y_0) − θ · (x_i − x_0))² / s_i²  +  (y_0 − θ · x_0)² / s_0²  +  Σ_j (θ_j − 1)² / τ²

with s_i the standard error of y_i − y_0: ridge regression towards prices as they are (Hoerl and Kennard), the posterior
mean for θ_j ~ N(1, τ²).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.plans import Choice, Planner, columns_of
from prismaquant_ray.formats import FORMATS
from prismaquant_ray.records import PlanRecord

# Spread of gains before anything is measured.
_TAU = 0.5
# Gains are kept between these: a price is never ignored, nor turned around.
_LEAST, _MOST = 0.1, 10.0
# What prices are multiplied by, one feature at a time, to get plans around the optimum.
_NUDGES = (2.0, 0.5, 4.0, 0.25)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Features:
    """`names` of kinds of groups in formats, and which one each candidate is (groups, formats), −1 for none."""

    names: tuple[str, ...]
    index: NDArray[np.int64]

    @classmethod
    def of(cls, planner: Planner) -> Features:
        """Kinds are last parts of groups' names. BF16 has no feature."""
        kinds = [group.name.rpartition(".")[2] for group in planner.layout.groups]
        known: dict[str, int] = {}
        index = np.full((len(kinds), len(planner.table.formats)), -1)
        for row, kind in enumerate(kinds):
            for column, name in enumerate(planner.table.formats):
                if FORMATS[name].codec is not None and not np.isnan(planner.table.token_fisher[row, column]):
                    index[row, column] = known.setdefault(f"{kind} {name}", len(known))
        return cls(names=tuple(known), index=index)

    def sums(self, planner: Planner, choice: Choice) -> NDArray[np.float64]:
        """Prices of a plan by feature (features,)."""
        columns = columns_of(choice, planner.layout, planner.table.formats)
        rows = np.arange(len(columns))
        index, cost = self.index[rows, columns], planner.table.token_fisher[rows, columns]
        found = np.zeros(len(self.names))
        np.add.at(found, index[index >= 0], cost[index >= 0])
        return found

    def scaled(self, planner: Planner, gains: NDArray[np.float64]) -> Planner:
        """A planner whose prices are multiplied by gains (features,)."""
        table = planner.table
        factors = np.where(self.index >= 0, gains[self.index], 1.0)
        return replace(planner, table=replace(table, token_fisher=table.token_fisher * factors))


def neighbours(planner: Planner, plan: PlanRecord, features: Features, count: int) -> list[PlanRecord]:
    """At most `count` other plans of the budget: optima when prices of one feature were larger or smaller."""
    found: dict[tuple[str, ...], PlanRecord] = {tuple(plan.choice.values()): plan}
    for nudged in _nudged(planner, features):
        other = nudged.plan
        found.setdefault(tuple(other.choice.values()), other)
        if len(found) > count:
            break
    return [*found.values()][1:]


def _nudged(planner: Planner, features: Features) -> Iterator[Planner]:
    for nudge in _NUDGES:
        for feature in range(len(features.names)):
            gains = np.ones(len(features.names))
            gains[feature] = nudge
            yield features.scaled(planner, gains)


def learned(sums: NDArray[np.float64], losses: Sequence[float], errors: Sequence[float]) -> NDArray[np.float64]:
    """Gains θ (features,) from x (plans, features), y (plans,) and s (plans,), of which s_0 is the error of y_0."""
    y, s = np.asarray(losses), np.asarray(errors)
    design = np.vstack([sums[:1], sums[1:] - sums[:1]])
    target = np.concatenate([y[:1], y[1:] - y[:1]])
    # What no measurement resolves: differences of equal plans, and errors of single sequences.
    weight = 1.0 / np.maximum(s, 1e-3 * max(float(y[0]), 1e-12))
    scaled, left = design * weight[:, None], (target - design.sum(1)) * weight
    size = sums.shape[1]
    theta = 1.0 + np.linalg.solve(scaled.T @ scaled + np.eye(size) / _TAU**2, scaled.T @ left)
    found: NDArray[np.float64] = np.clip(theta, _LEAST, _MOST)
    return found


def refined(planner: Planner, plan: PlanRecord, features: Features, gains: NDArray[np.float64]) -> PlanRecord:
    """The optimum under gains for the budget of a plan, with its own prices and type of KV cache."""
    other = features.scaled(planner, gains).plan
    return planner.plan_of(other.choice, plan.target, kv_cache=other.kv_cache)
