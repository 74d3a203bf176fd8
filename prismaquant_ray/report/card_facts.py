"""What a model card says, as plain facts, and what a source's own card says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from prismaquant_ray.report.markdown import line

# Entries of a list in the source's front matter that are taken over.
_ENTRIES = 8
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_WORD = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stated:
    """What the source's own card says in its front matter; `problem` is why that says nothing, else None.

    `quantized_from` are base models of which the source says that it has their weights, `derived_from` others.
    """

    problem: str | None = None
    license: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    quantized_from: tuple[str, ...] = ()
    derived_from: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    pipeline_tag: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The model that was quantized. `name` is as the user wrote it; `hub_id` only when it is one on the hub."""

    title: str
    name: str
    hub_id: str | None
    revision: str | None
    origin: str | None
    architecture: str
    guesses: tuple[str, ...]
    weight_bytes: int
    stated: Stated


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatShare:
    """What a format holds.

    `width` columns of a matrix share a scale, None where any number may. vLLM loads it on CUDA capabilities (×10) from
    `loads_from` on, 0 for any, and rounds activations from `full_from` on, None when they are never rounded.
    """

    name: str
    summary: str
    quantized: bool
    groups: int
    matrices: int
    parameters: int
    weight_bytes: int
    width: int | None
    loads_from: int
    full_from: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleRow:
    """Fused groups that have the same place in blocks of a kind: how many have which format."""

    kind: str
    name: str
    counts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Modules that were no candidates, for one reason: name with `*` for numbers → how many."""

    reason: str
    names: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """Of the matrices that ship in a format: output error on held-out calibration sequences, relative to rounding to
    nearest (geometric means), by method and as shipped; and how many matrices each method won.
    """

    format: str
    matrices: int
    ratios: Mapping[str, float]
    shipped: float
    won: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """What was measured of one plan, per token in nats. None is not measured."""

    kl_mean: float
    kl_standard_error: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    draft_agreement: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was measured of this plan: with its weights rounded, and with activations rounded as well."""

    file: str
    sha256: str
    tokens: int
    images: int
    source_perplexity: float | None
    source_draft_agreement: float | None
    weights: Divergence | None
    activations: Divergence | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRow:
    """A plan of the sweep; `chosen` is this repository's. Losses in nats per token."""

    target: str
    bpp: float
    predicted: float
    counts: Mapping[str, int]
    bytes_at_most: int
    measured_weights: float | None
    measured_activations: float | None
    chosen: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Knee:
    """Where the predicted frontier between two sizes bends most, in bits like `bpp`."""

    bpp: float
    from_bpp: float
    to_bpp: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Routed experts: layers that have them, experts a layer, calibration tokens of the one that saw fewest."""

    layers: int
    each: int
    fewest: int
    unseen: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What the run was measured on."""

    text: str
    text_sha256: str
    fingerprint: str
    tokens: int
    images: int
    seed: int
    labels: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """Everything a card says. Sizes in bytes, losses in nats per token, `bpp` in bits per quantizable parameter.

    `ruled` says that settings other than the budget limited the choice. `predicted` adds up the groups.
    `predicted_weights` and `predicted_activations` are what rounded weights and rounded activations cost by
    themselves, None when that was not recorded. `sweep` has this plan among its rows and leaves `more_targets` out;
    where no target of the sweep is within reach (`swept` is False) it has no other. `agreement` is by format how often
    the draft head's best guess is the model's, None without a draft head. `head` says that the output
    head is quantized. `expert_formats` are formats of experts that transformers gets wrong. `vllm` is the version
    that the formats were tried with. `config` is YAML.
    """

    version: str
    source: Source
    budget: str
    objective: str
    ruled: bool
    bpp: float
    bits_all_parameters: float
    weight_bytes: int
    predicted: float
    standard_error: float
    predicted_weights: float | None
    predicted_activations: float | None
    gap: float
    formats: tuple[FormatShare, ...]
    modules: tuple[ModuleRow, ...]
    kept: tuple[Kept, ...]
    rounding: tuple[Rounding, ...]
    sweep: tuple[SweepRow, ...]
    more_targets: int
    swept: bool
    knee: Knee | None
    measured: Measured | None
    experts: Experts | None
    vision_blocks: int
    agreement: Mapping[str, float] | None
    draft_weight: float
    head: bool
    expert_formats: tuple[str, ...]
    vllm: str
    calibration: Calibration
    config: str
    dtype: str
    device: str | None
    versions: Mapping[str, str]

    @property
    def quantized(self) -> tuple[FormatShare, ...]:
        """Formats in use other than BF16."""
        return tuple(share for share in self.formats if share.quantized)

    @property
    def waiting(self) -> tuple[FormatShare, ...]:
        """Formats that load on GPUs which do not round their activations."""
        return tuple(share for share in self.quantized if (share.full_from or 0) > share.loads_from)

    @property
    def widths(self) -> tuple[str, ...]:
        """Columns that share a scale, with the format."""
        return tuple(f"{share.width} ({share.name})" for share in self.quantized if share.width is not None)

    @property
    def base_models(self) -> tuple[str, ...]:
        """Hub ids of the model that was quantized, as far as that can be known."""
        return (self.source.hub_id,) if self.source.hub_id else self.source.stated.quantized_from


# The source's own card ----------------------------------------------------------------------------------------------


def stated(readme: str | None) -> Stated:
    """What a README.md says of licence, base model, language and task; values of another form are left out."""
    if readme is None:
        return Stated(problem="the source has no README.md")
    found = _FRONT_MATTER.match(readme.removeprefix("\ufeff"))
    if found is None:
        return Stated(problem="the source's README.md has no metadata")
    try:
        body = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        # ValueError: dates that are none.
        body = None
    if not isinstance(body, dict):
        return Stated(problem="the metadata of the source's README.md cannot be read")
    bases = tuple(name for name in _strings(body.get("base_model")) if _is_hub_id(name))
    same = body.get("base_model_relation") == "quantized"
    return Stated(
        license=tuple(name for name in _strings(body.get("license")) if _WORD.fullmatch(name)),
        license_name=next(iter(_strings(body.get("license_name"))), None),
        license_link=next(iter(_strings(body.get("license_link"))), None),
        quantized_from=bases if same else (),
        derived_from=() if same else bases,
        language=_strings(body.get("language")),
        pipeline_tag=next((tag for tag in _strings(body.get("pipeline_tag")) if _WORD.fullmatch(tag)), None),
    )


def _strings(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(line(entry) for entry in values[:_ENTRIES] if isinstance(entry, str) and entry.strip())


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
