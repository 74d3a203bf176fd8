"""Findings of blocks, fused groups and Linears: prices, composition of the budget's plan, gains of rounding.

Losses are nats per token; those of a draft head have the plan's weight. Sizes are bytes. Missing figures are None.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFindings:
    """A block: kind, module path, and the label of its column on the map."""

    index: int
    kind: str
    prefix: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupColumns:
    """Columns with one entry per fused group; those by format hold None where the group cannot take it.

    `module` is the name within the block. `weight_cost` and `activation_cost` are the parts of `cost` from rounding
    weights alone and activations alone; the rest is their cross term. `standard_error` and these parts are None under
    an objective other than token_fisher.
    """

    name: list[str]
    block: list[int]
    module: list[str]
    parameters: list[int]
    experts: list[int | None]
    linears: list[int]
    bytes: dict[str, list[int | None]]
    cost: dict[str, list[float | None]]
    standard_error: dict[str, list[float | None]]
    weight_cost: dict[str, list[float | None]]
    activation_cost: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes and predicted loss of some groups under the budget's plan; a sum is None if one of its terms is."""

    groups: int
    parameters: int
    parameters_by_format: dict[str, int]
    bytes: int
    bits: float | None
    cost: float | None
    standard_error: float | None
    weight_cost: float | None
    activation_cost: float | None
    cross_cost: float | None


@dataclass(frozen=True, kw_only=True)
class ModuleKind:
    """A module position in blocks of one kind: `module` is the name within the block, `label` the name for people."""

    kind: str
    module: str
    label: str


# JSON has the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class ModuleShare(Share, ModuleKind):
    """The groups at the same position in blocks of one kind."""


@dataclass(frozen=True, kw_only=True)
class InFormat:
    """A format."""

    format: str


@dataclass(frozen=True, kw_only=True)
class FormatShare(Share, InFormat):
    """The groups in one format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """Bytes and predicted loss of the budget's plan, by module and by format."""

    modules: list[ModuleShare]
    formats: list[FormatShare]
    all: Share


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Held-out output error of some matrices against round-to-nearest.

    `ratio` has one entry per method tried. `shipped` is the ratio of the winning methods, `low` and `high` its first
    and last decile; None without matrices to judge. `won` counts matrices by winning method; `judged` counts those with
    a nonzero round-to-nearest error.
    """

    ratio: dict[str, float]
    shipped: float | None
    low: float | None
    high: float | None
    won: dict[str, int]
    judged: int


@dataclass(frozen=True, kw_only=True)
class CodecMatrices:
    """The formats of a codec, and the number of matrices it rounded."""

    formats: list[str]
    matrices: int


@dataclass(frozen=True, kw_only=True)
class CodecGain(Gain, CodecMatrices):
    """Gain of one codec over all matrices, as geometric means."""


@dataclass(frozen=True, kw_only=True)
class RoundedLinear:
    """One Linear, or all experts' copies of it in a layer, and one codec."""

    linear: str
    block: int
    module: str
    codec: str
    experts: int | None


@dataclass(frozen=True, kw_only=True)
class LinearGain(Gain, RoundedLinear):
    """Gain of one codec on one Linear; the median over experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingFindings:
    """Gains of rounding, by codec and by Linear."""

    codecs: dict[str, CodecGain]
    linears: list[LinearGain]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertFindings:
    """Calibration tokens of a layer's experts; `even` is their mean per expert.

    A cold expert saw at least one token, but less than a tenth of `even`.
    """

    group: str
    block: int
    experts: int
    even: float
    fewest: int
    median: float
    most: int
    unseen: int
    cold: int
    tokens: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftFindings:
    """The draft head: top-1 agreement with the model by format, and its weighted share of each uniform loss."""

    prefix: str
    groups: int
    agreement: dict[str, float]
    tokens: int
    weight: float
    predicted_loss: dict[str, float | None]
