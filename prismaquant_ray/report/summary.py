"""The summary of both passes that `probe` and `quantize` print. Prices are `token_fisher` for any objective."""

from __future__ import annotations

from dataclasses import dataclass

from prismaquant_ray.backward.optimism import Optimism
from prismaquant_ray.report.gather import expert_findings
from prismaquant_ray.report.group_findings import GroupColumns
from prismaquant_ray.report.groups import agreement, group_columns, total
from prismaquant_ray.report.rounding_gain import rounding
from prismaquant_ray.report.run_data import RunData

_MOST = 10
#: How many times as much rounded weights may cost on held-out tokens before a summary says so.
OPTIMISTIC = 1.25


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPrice:
    """A fused group in a format, priced in nats per token."""

    group: str
    format: str
    cost: float
    standard_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTokens:
    """Calibration tokens per expert of a layer, their minimum, and the number of experts without tokens."""

    tokens: list[int]
    fewest: int
    unseen: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSummary:
    """Counts, the most sensitive groups and the gains of rounding.

    `uniform_loss` is by format, None where some group cannot take it; `holdout_error_to_nearest` and `methods` are by
    codec; `experts` by layer; `draft_agreement` by format of the whole draft head, None without one. No gradient
    reached the Linears in `without_gradient`: they are priced 0 in every format. `optimism` is by format how much more
    rounded weights cost on tokens that they were not fitted to, and what plans multiply their prices by.
    """

    run: str
    blocks: int
    groups: int
    tokens: int
    uniform_loss: dict[str, float | None]
    holdout_error_to_nearest: dict[str, float]
    methods: dict[str, dict[str, int]]
    most_sensitive: list[GroupPrice]
    experts: dict[str, ExpertTokens]
    draft_agreement: dict[str, float] | None
    without_gradient: list[str]
    optimism: dict[str, Optimism]
    peak_worker_bytes: int


def summarize_probe(data: RunData) -> ProbeSummary:
    """The report's figures that depend on the two passes only."""
    columns, calibration = group_columns(data, "token_fisher"), data.config.calibration
    codecs = {name: gain for name, gain in rounding(data).codecs.items() if gain.matrices}
    return ProbeSummary(
        run=data.uri,
        blocks=len(data.layout.blocks),
        groups=len(columns.name),
        tokens=calibration.sequences * calibration.length,
        uniform_loss={name: total(costs) for name, costs in columns.cost.items()},
        holdout_error_to_nearest={name: gain.shipped for name, gain in codecs.items() if gain.shipped is not None},
        methods={name: gain.won for name, gain in codecs.items()},
        most_sensitive=_most_sensitive(columns),
        experts={
            entry.group: ExpertTokens(tokens=entry.tokens, fewest=entry.fewest, unseen=entry.unseen)
            for entry in expert_findings(data)
        },
        draft_agreement=agreement(data.layout, data.backward),
        without_gradient=[
            name
            for record in data.backward.values()
            for name, trace in record.fisher_trace.items()
            if not any(trace if isinstance(trace, list) else [trace])
        ],
        optimism={str(name): found for name, found in data.table.optimism.items()},
        peak_worker_bytes=data.peak_bytes,
    )


def _most_sensitive(columns: GroupColumns) -> list[GroupPrice]:
    """The highest prices."""
    prices = [
        GroupPrice(group=group, format=name, cost=cost, standard_error=error)
        for name, costs in columns.cost.items()
        for group, cost, error in zip(columns.name, costs, columns.standard_error[name], strict=True)
        if cost is not None and error is not None and cost > 0
    ]
    return sorted(prices, key=lambda price: -price.cost)[:_MOST]
