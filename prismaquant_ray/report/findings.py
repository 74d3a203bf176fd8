"""Everything that a run found, gathered once: the terminal's summary, the page, its JSON and the card only arrange it.

Losses are nats per token; a draft head's are weighted as the plan weights them. Sizes are bytes. A figure that does not
exist is None. The fields are the keys of `report.json`, which docs/report.md describes; `schema` counts its versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prismaquant_ray.records import Divergence, EvaluationText, Knee, MeasuredKnee, ServerMemory, SourceFigures

#: The version of `report.json`.
SCHEMA = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFindings:
    """The source. `kept` lists the modules that stay unquantized, by reason."""

    title: str
    source: str
    revision: str
    architecture: str
    family: str
    guesses: list[str]
    parameters: int
    quantizable_parameters: int
    linears: int
    source_bytes: int
    kept: dict[str, list[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatFindings:
    """A format of the run; `letter` stands for it in a choice, `bits` are of a 4096 × 4096 Linear with its scales."""

    name: str
    letter: str
    bits: float
    codec: str | None
    summary: str
    needs: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredLosses:
    """What was measured of exactly this choice: with rounded weights only, and with rounded activations too."""

    weights: Divergence | None
    activations: Divergence | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFindings:
    """A plan; `choice` has one letter per group, in the groups' order, `groups` counts them by format."""

    target: str
    bpp: float
    predicted_loss: float
    gap: float
    weight_bytes: int
    repository_bytes_at_most: int
    groups: dict[str, int]
    loaded_bytes: int
    vram: ServerMemory | None
    standard_error: float | None
    choice: str
    measured: MeasuredLosses | None


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformFindings:
    """Every group in one format; figures are None where some group cannot take it."""

    format: str
    bpp: float | None
    weight_bytes: int | None
    repository_bytes_at_most: int | None
    predicted_loss: float | None
    standard_error: float | None
    measured: MeasuredLosses | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierCurve:
    """Every breakpoint of the whole frontier."""

    bpp: list[float]
    predicted_loss: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherMeasured:
    """A measured plan that is none of the report's: a control, or another objective's."""

    kind: str
    label: str
    target: str | None
    bpp: float
    weight_bytes: int
    objective: str | None
    predicted_loss: float
    weights: Divergence | None
    activations: Divergence | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredFindings:
    """What was measured, on what; `stale` are labels of plans that have changed since they were measured."""

    text: EvaluationText
    calibration_tokens: int
    source: SourceFigures
    knee: MeasuredKnee | None
    others: list[OtherMeasured]
    stale: list[str]


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


@dataclass(frozen=True, kw_only=True, slots=True)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleShare(Share):
    """The groups that have the same place in blocks of one kind."""

    kind: str
    module: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatShare(Share):
    """The groups in one format."""

    format: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """Where the bits of the budget's plan went and what they cost."""

    modules: list[ModuleShare]
    formats: list[FormatShare]
    all: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryFindings:
    """What the repository of the budget's plan holds; `written` is the last one that was, or None."""

    written: dict[str, Any] | None
    quantizable_bytes: int
    embedding_bytes: int
    other_tensor_bytes: int
    at_most_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecGain(Gain):
    """All matrices by one codec: geometric means."""

    formats: list[str]
    matrices: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearGain(Gain):
    """One Linear by one codec; of experts the median."""

    linear: str
    block: int
    module: str
    codec: str
    experts: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingFindings:
    """What rounding gained, by codec and by Linear."""

    codecs: dict[str, CodecGain]
    linears: list[LinearGain]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertFindings:
    """Calibration tokens of a layer's experts; `even` is what each would see if all were used equally.

    A cold expert saw less than `COLD` of that.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationFindings:
    """What the run was measured on; `priced_tokens` is the N of the prices, `fingerprint` that of the run."""

    text: str
    sequences: int
    length: int
    tokens: int
    priced_tokens: int
    images: str | None
    digest: str | None
    fingerprint: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpans:
    """What a worker did in a pass: `spans` are shard, first and last second since the pass began."""

    worker: str
    steps: int
    seconds: float
    busy: float | None
    peak_bytes: int
    spans: list[tuple[str, float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTiming:
    """An attempt at a pass; seconds are of the wall clock."""

    stage: str
    units: int
    seconds: float
    token_blocks_per_second: float | None
    hop_bytes: int
    read_bytes: int
    written_bytes: int
    workers: list[WorkerSpans]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """How long everything took."""

    attempts: int
    passes: list[PassTiming]
    planning_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A machine on which workers ran."""

    host: str
    device: str
    version: str
    host_bytes: int
    workers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """Where workers ran, over all attempts."""

    hosts: list[Host]
    lost: int
    repairs: int
    peak_worker_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything that a run found. `budget` is the place among `plans` of the configured budget's plan."""

    schema: int
    made: str
    run: str
    model: ModelFindings
    formats: list[FormatFindings]
    objective: str
    budget: int
    plans: list[PlanFindings]
    out_of_reach: list[float]
    uniform: list[UniformFindings]
    frontier: FrontierCurve | None
    knee: Knee | None
    measured: MeasuredFindings | None
    blocks: list[BlockFindings]
    groups: GroupColumns
    composition: Composition
    repository: RepositoryFindings
    rounding: RoundingFindings
    experts: list[ExpertFindings]
    draft: DraftFindings | None
    calibration: CalibrationFindings
    timings: Timings
    machines: Machines
    versions: dict[str, str | None]
    settings: dict[str, Any]

    @property
    def plan(self) -> PlanFindings:
        """The plan of the configured budget."""
        return self.plans[self.budget]
