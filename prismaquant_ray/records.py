"""The JSON objects of a run store: a dataclass for each of them, and every key.

A record is written once and read by every later stage, so this module imports nothing that computes.
`prismaquant_ray.serialization` is the only writer and the only reader of a record.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from typing_extensions import TypeAliasType

from prismaquant_ray.formats import FormatName
from prismaquant_ray.gpus import GpuName

T = TypeVar("T")

#: What JSON can say.
Json = TypeAliasType("Json", "dict[str, Json] | list[Json] | str | bool | int | float | None")
#: Settings as JSON, by name.
Settings = dict[str, Json]

# Keys ---------------------------------------------------------------------------------------------------------------

#: Configuration and fingerprint of the run; created first.
RUN = "run.json"
#: The model as the quantizer sees it; written when both passes are complete.
LAYOUT = "layout.json"
#: Both passes are complete.
MEASURED = "measured.json"
#: The kind of device that the run began on.
DEVICE = "device.json"
#: The event log, one JSON object per line.
EVENTS = "events.jsonl"
#: The tokens of the calibration set.
CALIBRATION = "calibration/"
CALIBRATION_RECORD = f"{CALIBRATION}record.json"
#: Plans by target, the sweep, and the measured losses of plans.
PLANS = "plans/"
SWEEP = f"{PLANS}sweep.json"
MEASURED_PLANS = f"{PLANS}measured.json"
#: The HTML report, its JSON and its plots.
REPORT = "report/"
#: Figures of evaluated models, and the boundaries of an evaluation that is running.
EVALUATIONS = "evaluations"
RUNNING_EVALUATION = f"{EVALUATIONS}/running"

#: The name of the factors of a block's folds among its candidates.
FACTORS = "factors"
#: Under a pass and a unit: its product, and its output.
RECORD = "record.json"
BOUNDARY = "boundary.json"


def refinement_key(target: str) -> str:
    """What measuring changed in the plan for a target."""
    return f"{PLANS}{target}.refinement.json"


def plan_key(target: str) -> str:
    """The plan of a budget, by its target, e.g. 5.5bpp."""
    return f"{PLANS}{target}.json"


def record_key(stage: str, unit: str) -> str:
    """The record of a unit of a pass."""
    return f"{stage}/{unit}/{RECORD}"


def boundary_key(stage: str, unit: str) -> str:
    """The record that names the stored boundary activations or gradients of a unit."""
    return f"{stage}/{unit}/{BOUNDARY}"


def tensors_key(stage: str, unit: str, attempt: str, name: str) -> str:
    """Where one attempt at a unit stores tensors: a format's candidates, boundaries, evaluation figures."""
    return f"{stage}/{unit}/{attempt}/{name}.safetensors"


def evaluation_key(digest: str) -> str:
    """The record of an evaluated model, by the digest of everything its figures depend on."""
    return f"{EVALUATIONS}/{digest}/{RECORD}"


# Records of measurements -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenText:
    """What was taken of a source of text, whose content has that sha256.

    `rows` were read, `dropped` of them had no text; both are None for plain text.
    """

    name: str
    sha256: str
    sequences: int
    tokens: int
    rows: int | None = None
    dropped: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRecord:
    """Which calibration set is stored, and what it was made from."""

    fingerprint: str
    sources: tuple[TakenText, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """KL(source ‖ quantized) over all tokens, in nats per token, and other measures of a quantized model.

    `kl_standard_error` is that of the mean, with sequences as the independent samples; `top1_agreement` is the share of
    tokens where both find the same token most likely; `loss` is the model's cross-entropy in nats per predicted token,
    and `perplexity` its exponential; `draft_agreement` is how often the draft head's best guess is its own model's;
    `rerouted` is, of a mixture of experts, the share of tokens that meet other experts than in the source, a mean over
    its layers.
    """

    tokens: int
    kl_mean: float
    kl_standard_error: float
    kl_p90: float
    kl_p99: float
    top1_agreement: float
    loss: float
    perplexity: float
    draft_agreement: float | None = None
    rerouted: float | None = None


# Other objects of the run store ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """`run.json`: the configuration, and the values that measurements and candidates depend on, by displayed name.

    Both are compared and shown, never computed with.
    """

    fingerprint: Settings
    config: Settings

    @property
    def source(self) -> str:
        """`model.source` of the configuration."""
        model = self.config.get("model")
        if not isinstance(model, dict) or "source" not in model:
            raise ValueError("config.model: not a section with a source")
        return str(model["source"])


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRecord:
    """`measured.json`: both passes are complete; the most memory that one worker took, in bytes."""

    peak_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRecord:
    """`device.json`: the kind of device that the run began on."""

    device: str


#: Type of a KV cache: the model's own 16 bits, or FP8 with stored scales.
CacheType = Literal["bf16", "fp8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerMemory:
    """Bytes that a server takes for `sequences` sequences of `context` tokens; `kv_cache_of` is by kind of layer."""

    total: int
    weights: int
    kv_cache: int
    margin: int
    kv_cache_of: dict[str, int]
    context: int
    sequences: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanTimes:
    """Time of a plan's Linears per token by the roofline of a card: no measurement, and nothing but Linears in it.

    `prefill` is of a prompt's token, bound by products, `decode` of a generated token of a single sequence, bound by
    bytes; both relative to the fastest plan of any size. The limits are those that were set, if any.
    """

    gpu: GpuName
    prefill: float
    decode: float
    prefill_seconds: float
    decode_seconds: float
    prefill_limit: float | None
    decode_limit: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSummary:
    """The figures of a plan.

    `predicted_loss` is nats per token under `objective`, `bound` no plan's is below, `gap` their relative distance.
    `weight_bytes` are codes and group scales; `bpp` is bits of those per quantizable parameter;
    `repository_bytes_at_most` bounds the whole repository, `loaded_bytes` are all tensors as a server loads them.
    `groups` counts groups by format. `kv_cache` is the type of the KV cache that it is served with; `kv_cache_loss` is
    what that costs, always under `token_fisher`, with its standard error, and part of `predicted_loss`.
    """

    target: str
    objective: Literal["token_fisher", "fisher_trace"]
    predicted_loss: float
    standard_error: float
    bound: float
    gap: float
    bpp: float
    weight_bytes: int
    repository_bytes_at_most: int
    loaded_bytes: int
    vram: ServerMemory | None
    times: PlanTimes
    groups: dict[FormatName, int]
    kv_cache: CacheType = "bf16"
    kv_cache_loss: float = 0.0
    kv_cache_error: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRecord(PlanSummary):
    """`plans/<target>.json`: a plan, which is the format of every fused group."""

    choice: dict[str, FormatName]

    @property
    def summary(self) -> PlanSummary:
        """Its figures alone."""
        return PlanSummary(**{field.name: getattr(self, field.name) for field in fields(PlanSummary)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Knee:
    """Where the predicted frontier between two sizes bends most; sizes in bits per quantizable parameter."""

    bpp: float
    predicted_loss: float
    from_bpp: float
    to_bpp: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRecord:
    """`plans/sweep.json`: a plan per target, the targets that no plan reaches, the knee of the whole frontier."""

    targets: list[PlanRecord]
    out_of_reach: list[float]
    knee: Knee | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationText:
    """The evaluation data that plans were measured on: what its sources are called, and what was taken of each."""

    file: str
    sha256: str
    sequences: int
    tokens: int
    images: int
    sources: tuple[TakenText, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFigures:
    """The source's own cross-entropy in nats per token, perplexity, and draft agreement if it has a draft head."""

    loss: float
    perplexity: float
    draft_agreement: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Excess:
    """How much higher a control's mean KL is than the plan's for the same target, paired by token."""

    kl: float
    standard_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """What `allocation.refine` did: `gains` on prices by kind of group and format, learned from measured `plans`.

    `before`, `after` and `change` are KL in nats per token on the sequences that taught nothing, with the standard
    error of `change`; `kept` says whether the refined plan is used.
    """

    target: str
    plans: int
    gains: dict[str, float]
    groups_changed: int
    before: float
    after: float
    change: float
    change_error: float
    kept: bool


#: Plans that are measured: a plan of ours, or a control, see `allocation.baselines`.
PlanKind = Literal["plan", "uniform", "mixture", "by_hand", "fisher_trace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredPlan:
    """A plan or control with predicted and measured loss; `target` is None for one format throughout.

    `kind` is plan, uniform, mixture, by_hand or fisher_trace. Predictions are of the body: a draft head is not in them.
    An FP8 `kv_cache` is in both, and in the measurement with rounded activations.
    """

    target: str | None
    kind: PlanKind
    label: str
    objective: Literal["token_fisher", "fisher_trace"] | None
    bpp: float
    weight_bytes: int
    groups: dict[FormatName, int]
    predicted_loss: float
    standard_error: float
    choice: dict[str, FormatName]
    weights: Divergence | None
    activations: Divergence
    behind_plan: Excess | None
    kv_cache: CacheType = "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class KneeRange:
    """The knee of the measured curve over a shorter range; in bits per quantizable parameter."""

    from_bpp: float
    to_bpp: float
    bpp: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredKnee:
    """Where the measured curve bends most, and over shorter ranges: how stable that is."""

    bpp: float
    kl: float
    from_bpp: float
    to_bpp: float
    stability: list[KneeRange]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredPlans:
    """`plans/measured.json`: predicted and measured loss of plans and controls on one text.

    `code` is the version, `run` says which run they are of, as in its records.
    """

    code: str
    run: str
    text: EvaluationText
    calibration_tokens: int
    source: SourceFigures
    plans: list[MeasuredPlan]
    knee: MeasuredKnee | None
