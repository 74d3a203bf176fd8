"""What the errors of different groups have to do with each other, and plans refined with it.

With p_t of a candidate the projection of its output error on the loss gradient at token t, a plan's loss is
q = ½ Σ_t (Σ_G p_t,G)² / N: the costs of its groups, and for every two of them Σ_t p_t,G p_t,H / N, which is positive
where errors add up and negative where they cancel. All of it is in the Gram matrix of the p vectors, so that no plan
needs them again.

A search for plans whose errors cancel also finds those whose errors only seem to, on the tokens at hand. Therefore the
terms between groups are shrunk to the share of their variance that is not noise before a plan is chosen by them, and
what a refinement gains is also taken on sequences that had no part in choosing it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.local_search import Resource, improved
from prismaquant_ray.allocation.problem import AllocationProblem, Floats, Ints, Plan
from prismaquant_ray.allocation.second_limit import SecondLimit

__all__ = ["Interactions", "Refinement", "bytes_needed", "refine"]

#: Parts of the sequences, each judging plans chosen on the others.
FOLDS = 8

#: The plan for costs (groups, formats), other things equal.
SolveAt = Callable[[Floats], Plan]


def bytes_needed(vectors: int, tokens: int, choices: int) -> int:
    """Memory for Gram matrices: every vector (tokens,) float32, a matrix (choices, choices) float64 a fold and more."""
    return 4 * vectors * tokens + 8 * choices**2 * (FOLDS + 6)


@dataclass(frozen=True, kw_only=True, slots=False, eq=False)
class Interactions:
    """Half the Gram matrix of every fold, by choice: entry (g · formats + f, h · formats + k).

    `own` (groups, formats) is the cost of groups with a loss or positions of their own (draft heads, vision towers),
    which interact with nothing; zero for the others, and NaN for formats that a group cannot take.
    """

    groups: tuple[str, ...]
    formats: tuple[str, ...]
    own: Floats
    halves: Floats  # (folds, choices, choices), summed over tokens
    tokens: Ints  # (folds,)

    @classmethod
    def of(
        cls,
        groups: Sequence[str],
        formats: Sequence[str],
        cost: Floats,
        vectors: Iterable[tuple[str, str, NDArray[np.float32]]],
        *,
        lengths: Sequence[int],
        apart: Collection[str] = (),
    ) -> Interactions:
        """From p vectors (tokens of all sequences,) by group and format; a choice without one has no error.

        `cost` (groups, formats) is that of additive plans, `lengths` are the tokens of each sequence, and `apart` names
        the groups that have their cost and interact with nothing. Vectors are all held at once; sums are in float64.
        """
        rows = {group: row for row, group in enumerate(groups)}
        columns = {name: column for column, name in enumerate(formats)}
        found: dict[int, NDArray[np.float32]] = {}
        for group, name, p in vectors:
            assert p.shape == (sum(lengths),), f"{group} {name}: {p.shape} values for {sum(lengths)} tokens"
            found[rows[group] * len(columns) + columns[name]] = p
        size, folds = len(rows) * len(columns), min(FOLDS, len(lengths))
        halves, tokens = np.zeros((folds, size, size)), np.zeros(folds, dtype=np.int64)
        at = np.array(list(found), dtype=np.int64)
        start = 0
        for sequence, length in enumerate(lengths):
            tokens[sequence % folds] += length
            if found:
                p = np.stack([vector[start : start + length] for vector in found.values()]).astype(np.float64)
                halves[sequence % folds][np.ix_(at, at)] += 0.5 * (p @ p.T)
            start += length
        separate = np.array([group in apart for group in groups])[:, None]
        own = np.where(separate | np.isnan(cost), cost, 0.0)
        return cls(groups=tuple(groups), formats=tuple(formats), own=own, halves=halves, tokens=tokens)

    @property
    def folds(self) -> int:
        """Number of folds."""
        return len(self.tokens)

    @cached_property
    def total(self) -> Floats:
        """Half the Gram matrix per token."""
        return self.mean(range(self.folds))

    def mean(self, folds: Sequence[int]) -> Floats:
        """Half the Gram matrix per token of these folds."""
        chosen = list(folds)
        return np.asarray(self.halves[chosen].sum(axis=0) / self.tokens[chosen].sum())

    def shrinkage(self, folds: Sequence[int]) -> float:
        """The share in [0, 1] of the variance of the terms between groups, over pairs of choices, that is not noise.

        Terms are taken as correlations. Their variance from fold to fold, divided by the number of folds, is the noise
        of their mean (James & Stein 1961, with the variances estimated). One fold cannot tell: 0.
        """
        if len(folds) < 2:
            return 0.0
        matrix = self.mean(folds)
        scale = np.sqrt(np.diagonal(matrix))
        scale = np.where(scale > 0, scale, np.inf)
        between = self.split(matrix)[1] / np.outer(scale, scale)
        squares = np.zeros_like(between)
        for fold in folds:
            part = self.split(self.halves[fold] / self.tokens[fold])[1] / np.outer(scale, scale)
            squares += np.square(part - between)
        signal = float(np.square(between).sum())
        noise = float(squares.sum()) / (len(folds) * (len(folds) - 1))
        return max(0.0, 1.0 - noise / signal) if signal > 0 else 0.0

    def split(self, matrix: Floats) -> tuple[Floats, Floats]:
        """Costs (groups, formats) on the diagonal, with `own`, and what is left between groups."""
        count = len(self.formats)
        of = np.repeat(np.arange(len(self.groups)), count)
        cost = np.diagonal(matrix).reshape(self.own.shape) + self.own
        return cost, np.where(of[:, None] == of, 0.0, matrix)

    def others(self, fold: int) -> list[int]:
        """Every fold but one."""
        return [other for other in range(self.folds) if other != fold]

    def columns(self, choice: Mapping[str, str]) -> Ints:
        """(groups,) column of every group's format."""
        return np.array([self.formats.index(choice[group]) for group in self.groups], dtype=np.int64)

    def quadratic(self, choice: Mapping[str, str]) -> float:
        """q of a plan, nats per token."""
        return self.price(self.columns(choice), self.total)

    def standard_error(self, choice: Mapping[str, str]) -> float:
        """Of q, by jackknife over the folds."""
        columns, folds = self.columns(choice), self.folds
        if folds < 2:
            return 0.0
        left_out = np.array([self.price(columns, self.mean(self.others(fold))) for fold in range(folds)])
        return float(np.sqrt((folds - 1) / folds * np.square(left_out - left_out.mean()).sum()))

    def price(self, columns: Ints, matrix: Floats) -> float:
        """q with half a Gram matrix per token."""
        rows = np.arange(len(columns))
        at = rows * len(self.formats) + columns
        return float(matrix[np.ix_(at, at)].sum() + self.own[rows, columns].sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """A refined plan, and what that is worth.

    `before` and `after` are q of the additive plan and of this one on all tokens; `after` is never higher, and too low
    by what the choice owes to chance. `crossfit_gain` is the mean gain of the same procedure on sequences that had no
    part in it, with the standard error of that mean over the folds: what to expect on other text. `shrinkage` is the
    share of the terms between groups that was believed, `changed` the number of groups with another format.
    """

    plan: Plan
    before: float
    after: float
    changed: int
    shrinkage: float
    crossfit_gain: float
    crossfit_standard_error: float


def refine(
    problem: AllocationProblem,
    plan: Plan,
    interactions: Interactions,
    solve_at: SolveAt,
    second: SecondLimit | None = None,
) -> Refinement:
    """Lower q from an additive plan by changes of one or two groups, within its budget and the second limit.

    `solve_at` gives the additive plan for the same budget at other costs: those of a part of the sequences. The plan's
    own cost and bound stay those of the additive problem.
    """
    resources = [Resource(problem.size, plan.budget)]
    if second is not None:
        resources.append(Resource(second.use, second.limit))

    def costs(folds: Sequence[int]) -> tuple[Floats, Floats]:
        cost, pairs = interactions.split(interactions.mean(folds))
        return np.where(problem.allowed, cost, np.nan), interactions.shrinkage(folds) * pairs

    def refined(columns: Ints, folds: Sequence[int]) -> Ints:
        cost, pairs = costs(folds)
        return improved(columns, cost, resources=resources, pairs=pairs)

    every = range(interactions.folds)
    start = interactions.columns(plan.choice)
    end = refined(start, every)
    before, after = (interactions.price(columns, interactions.total) for columns in (start, end))
    if after > before:  # a plan that is not proven optimal may be improved where q is not
        end, after = start, before
    gains = []
    for fold in every if len(every) > 1 else ():
        others = interactions.others(fold)
        begin = interactions.columns(solve_at(costs(others)[0]).choice)
        judge = interactions.mean([fold])
        gains.append(interactions.price(begin, judge) - interactions.price(refined(begin, others), judge))
    cost = problem.plan(end, plan.budget, 0.0).cost
    return Refinement(
        plan=problem.plan(end, plan.budget, cost - plan.bound),
        before=before,
        after=after,
        changed=int((start != end).sum()),
        shrinkage=interactions.shrinkage(every),
        crossfit_gain=float(np.mean(gains)) if gains else 0.0,
        crossfit_standard_error=float(np.std(gains, ddof=1) / np.sqrt(len(gains))) if gains else 0.0,
    )
