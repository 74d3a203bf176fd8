"""The JSON objects of blocks in a run store: how they were rounded, and what their candidates cost.

Like `prismaquant_ray.records`, this imports nothing that computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from prismaquant_ray.fold import Fold
from prismaquant_ray.formats import FormatName

T = TypeVar("T")

#: Ways to round a weight, in order of simplicity: a tie goes to the first.
Method = Literal["nearest", "search", "gptq"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRounding:
    """How one Linear was rounded by one codec; of experts every figure is a list with an entry per expert.

    `holdout_error` is Σ_t |ΔW x_t|² over held-out tokens per (token × output) of every method that was tried, `method`
    the one that won, `weight_mse` the mean ΔW² of its result.
    """

    method: Method | list[Method]
    holdout_error: dict[Method, float | list[float]]
    weight_mse: float | list[float]

    @classmethod
    def joined(cls, parts: Sequence[LinearRounding]) -> LinearRounding:
        """Figures of some experts after those of others."""
        return cls(
            method=_chained(part.method for part in parts),
            holdout_error={
                name: _chained(part.holdout_error[name] for part in parts) for name in parts[0].holdout_error
            },
            weight_mse=_chained(part.weight_mse for part in parts),
        )

    def matrices(self) -> Iterator[tuple[Method, dict[Method, float]]]:
        """Winning method and held-out error by method, of the Linear or of every expert's."""
        if isinstance(self.method, str):
            yield self.method, {name: error for name, error in self.holdout_error.items() if isinstance(error, float)}
            return
        columns = {name: error for name, error in self.holdout_error.items() if isinstance(error, list)}
        for expert, method in enumerate(self.method):
            yield method, {name: column[expert] for name, column in columns.items()}


def _chained(parts: Iterable[T | list[T]]) -> list[T]:
    return [each for part in parts for each in (part if isinstance(part, list) else [part])]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheScales:
    """What an attention divides keys and values by in an FP8 cache, and the largest |k| and |v| in calibration.

    `folded_value` is that of values where a plan has the fold that equalizes them, None without such a fold.
    """

    key: float
    value: float
    folded_value: float | None
    key_amax: float
    value_amax: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePrice:
    """The loss that an attention's rounded cache costs, in nats per token.

    `key_cost` and `value_cost` are those of rounded keys alone and of rounded values alone; `standard_error` is that of
    `cost`, by jackknife over sequences.
    """

    cost: float
    standard_error: float
    key_cost: float
    value_cost: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardRecord:
    """The forward pass's record of a block: rounding by Linear and codec, calibration tokens per expert by group.

    `folds` took factors that equalize inputs; `storing` is, by Linear, the mean ΔW² of storing what they made of its
    weight in 16 bits, of experts with an entry per expert. `cache` has the scales of an FP8 cache by attention.
    """

    linears: dict[str, dict[str, LinearRounding]]
    experts: dict[str, list[int]]
    folds: list[Fold] = field(default_factory=list)
    storing: dict[str, list[float]] = field(default_factory=dict)
    cache: dict[str, CacheScales] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceOn:
    """The loss that one fused group costs in one format on some sequences, in nats per token.

    `weight_cost` and `activation_cost` are those of rounded weights alone and of rounded activations alone;
    `standard_error` is that of `cost`, by jackknife over sequences, 0 for a single one.
    """

    cost: float
    standard_error: float
    weight_cost: float
    activation_cost: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Price(PriceOn):
    """The loss on all calibration sequences, and on those that no candidate was fitted to."""

    held_out: PriceOn
    fitted: PriceOn


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardRecord:
    """The backward pass's record of a block: prices by fused group and format, Fisher traces by Linear.

    `tokens` is the N of the prices, `held_out_tokens` that of `Price.held_out`. `agreement` is, for a draft head, how
    often its best guess is the model's, by the format of the whole head. `cache` has what an FP8 cache costs, by
    attention.
    """

    groups: dict[str, dict[FormatName, Price]]
    fisher_trace: dict[str, float | list[float]]
    tokens: int
    held_out_tokens: int
    agreement: dict[str, float] | None = None
    cache: dict[str, CachePrice] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftRecord:
    """A draft head in an evaluation: by row, predictions that agree with their own model; number of predictions."""

    agreed: list[int]
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRecord:
    """A mixture block in an evaluation: by row, tokens whose set of experts is not the source's; number of tokens."""

    rerouted: list[int]
    tokens: int
