"""What a run found of blocks, fused groups and Linears: prices, where a plan's bits went, what rounding gained.

Losses are nats per token; a draft head's are weighted as the plan weights them. Sizes are bytes. A figure that does not
exist is None.
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
    """Columns with an entry per fused group; those by format hold None where the group cannot take it.

    `module` is the name within the block. `weight_cost` and `activation_cost` are the parts of `cost` that rounding
    weights alone and rounding activations alone would cause (the rest is their cross term). `standard_error` and the
    parts belong to the objective token_fisher and are None with another one.
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
    """Bytes and predicted loss of some groups under the budget's plan; None where a part of the sum does not exist."""

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
    """A place in blocks of one kind: `module` is the name within the block, `label` names it for people."""

    kind: str
    module: str
    label: str


# JSON has the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class ModuleShare(Share, ModuleKind):
    """The groups that have the same place in blocks of one kind."""


@dataclass(frozen=True, kw_only=True)
class InFormat:
    """A format."""

    format: str


@dataclass(frozen=True, kw_only=True)
class FormatShare(Share, InFormat):
    """The groups in one format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """Where the bits of the budget's plan went and what they cost."""

    modules: list[ModuleShare]
    formats: list[FormatShare]
    all: Share


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Held-out output error of some matrices against round-to-nearest.

    `ratio` has an entry per method that was tried, `shipped` is that of the methods that won, `low` and `high` its
    first and last decile; None where nothing can be judged. `won` counts matrices by winning method; `judged` are those
    of which round-to-nearest makes an error.
    """

    ratio: dict[str, float]
    shipped: float | None
    low: float | None
    high: float | None
    won: dict[str, int]
    judged: int


@dataclass(frozen=True, kw_only=True)
class CodecMatrices:
    """The formats of a codec, and how many matrices were rounded by it."""

    formats: list[str]
    matrices: int


@dataclass(frozen=True, kw_only=True)
class CodecGain(Gain, CodecMatrices):
    """All matrices by one codec: geometric means."""


@dataclass(frozen=True, kw_only=True)
class RoundedLinear:
    """One Linear, or that of all experts of a layer, by one codec."""

    linear: str
    block: int
    module: str
    codec: str
    experts: int | None


@dataclass(frozen=True, kw_only=True)
class LinearGain(Gain, RoundedLinear):
    """One Linear by one codec; of experts the median."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingFindings:
    """What rounding gained, by codec and by Linear."""

    codecs: dict[str, CodecGain]
    linears: list[LinearGain]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertFindings:
    """Calibration tokens of a layer's experts; `even` is what each would see if all were used equally.

    A cold expert saw less than a tenth of that, but something.
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
    """The draft head: how often its best guess is the model's by format, its weighted part of every uniform loss."""

    prefix: str
    groups: int
    agreement: dict[str, float]
    tokens: int
    weight: float
    predicted_loss: dict[str, float | None]
