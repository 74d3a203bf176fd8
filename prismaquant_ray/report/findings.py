"""All findings of a run, gathered once; terminal summary, page, JSON and card only arrange them.

Losses are nats per token; those of a draft head have the plan's weight. Sizes are bytes. Missing figures are None. The
fields are the keys of `report.json`, which docs/report.md describes; `schema` counts its versions.
"""

from __future__ import annotations

from dataclasses import dataclass

from prismaquant_ray.events import PlacedRepository
from prismaquant_ray.records import (
    CacheType,
    Divergence,
    EvaluationText,
    Knee,
    MeasuredKnee,
    PlanTimes,
    ServerMemory,
    Settings,
    SourceFigures,
    TakenText,
)
from prismaquant_ray.report.group_findings import (
    BlockFindings,
    Composition,
    DraftFindings,
    ExpertFindings,
    GroupColumns,
    RoundingFindings,
)

#: The version of `report.json`.
SCHEMA = 3


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
    """Measured losses of exactly this choice: with rounded weights only, and with rounded activations too."""

    weights: Divergence | None
    activations: Divergence | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFindings:
    """A plan; `choice` has one letter per group, in the groups' order, `groups` counts them by format.

    `kv_cache_loss` is the part of `predicted_loss` that a rounded KV cache costs, with its standard error.
    """

    target: str
    bpp: float
    predicted_loss: float
    gap: float
    weight_bytes: int
    repository_bytes_at_most: int
    groups: dict[str, int]
    loaded_bytes: int
    vram: ServerMemory | None
    times: PlanTimes
    standard_error: float | None
    choice: str
    measured: MeasuredLosses | None
    kv_cache: CacheType = "bf16"
    kv_cache_loss: float = 0.0
    kv_cache_error: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformFindings:
    """Every group in one format; figures are None where some group cannot take it."""

    format: str
    bpp: float | None
    weight_bytes: int | None
    repository_bytes_at_most: int | None
    times: PlanTimes | None
    predicted_loss: float | None
    standard_error: float | None
    measured: MeasuredLosses | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierCurve:
    """Every breakpoint of the whole frontier; under limits on time, evenly spaced points of its linear relaxation."""

    bpp: list[float]
    predicted_loss: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SurfaceCurve:
    """The frontier within a limit on prefill, None for no limit, of the linear relaxation: no plan is better."""

    prefill: float | None
    bpp: list[float]
    predicted_loss: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherMeasured:
    """A measured plan that is not one of the report's: a baseline, or a plan of another objective."""

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
    """Measured losses and their text; `stale` has the labels of plans that changed after they were measured."""

    text: EvaluationText
    calibration_tokens: int
    source: SourceFigures
    knee: MeasuredKnee | None
    others: list[OtherMeasured]
    stale: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryFindings:
    """Contents of the repository of the budget's plan; `written` is the last one written, or None."""

    written: PlacedRepository | None
    quantizable_bytes: int
    embedding_bytes: int
    other_tensor_bytes: int
    at_most_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationFindings:
    """The calibration data; `priced_tokens` is the N of the prices, `fingerprint` that of the run."""

    text: str
    sequences: int
    length: int
    tokens: int
    priced_tokens: int
    images: str | None
    digest: str | None
    fingerprint: Settings
    sources: tuple[TakenText, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpans:
    """A worker in a pass; each of `spans` is a shard with its first and last second since the pass began."""

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
    """All findings of a run. `budget` is the index in `plans` of the configured budget's plan."""

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
    frontier: FrontierCurve
    surface: list[SurfaceCurve]
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
    settings: Settings

    @property
    def plan(self) -> PlanFindings:
        """The plan of the configured budget."""
        return self.plans[self.budget]
