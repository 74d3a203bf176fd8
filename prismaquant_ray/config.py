"""The configuration: one typed tree, one default for every setting, checked before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from prismaquant_ray.config_values import Bytes, Location, Margin, Section
from prismaquant_ray.errors import ConfigError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.gpus import GpuName


class ModelConfig(Section):
    """The model to quantize."""

    source: str = Field(
        min_length=1,
        description="Checkpoint: a local directory, an `s3://` or `gs://` URI, or a hub id, which every node fetches.",
    )
    revision: str = Field(default="main", description="Branch, tag or commit of a hub id.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Blocks compute in this dtype. `auto` is bfloat16 with `cluster.device: gpu`, or with `auto` where "
        "this machine has a GPU, else float32. The run records which.",
    )
    quantize_lm_head: bool = Field(
        default=False,
        description="Quantize an untied output head like any other Linear. vLLM before 0.32 may refuse it.",
    )

    @property
    def bytes_per_value(self) -> int:
        """Bytes of a value in `dtype`, or at most, where that is not decided."""
        return 2 if self.dtype == "bfloat16" else 4


class CalibrationConfig(Section):
    """The text that is run through the model to measure it."""

    text: Path = Field(description="Plain text file, like what the model will read.")
    images: Path | None = Field(
        default=None, description="JSONL file of images with captions. Without it a vision tower stays in BF16."
    )
    sequences: int = Field(default=128, ge=2, description="Number of sequences.")
    length: int = Field(default=1024, ge=2, description="Tokens per sequence.")
    seed: int = Field(default=0, ge=0, description="Seed of the choice of sequences and of the sampled labels.")
    holdout: float = Field(
        default=0.125,
        gt=0.0,
        lt=1.0,
        description="Share of the sequences held out to decide, per Linear, whether GPTQ beats searched rounding.",
    )
    microbatch: int = Field(default=4, ge=1, description="Sequences run at once.")
    labels: Literal["sampled", "data"] = Field(
        default="sampled",
        description="Labels of the loss: sampled from the prediction (Fisher) or the text's own (empirical Fisher).",
    )


#: Kinds of budget; exactly one is given.
BUDGETS = ("bpp", "bytes", "vram")


class BudgetConfig(Section):
    """The size of the result: exactly one of `bpp`, `bytes` and `vram`. docs/budgets.md has the arithmetic."""

    bpp: float | None = Field(default=None, gt=0.0, description="Bits per quantizable parameter, scales included.")
    bytes: Bytes | None = Field(default=None, description="Bytes of the whole repository.")
    vram: Bytes | None = Field(
        default=None, description="Memory of the GPUs of one server: weights as loaded, KV cache and margin."
    )
    context: int | None = Field(
        default=None,
        ge=1,
        description="Tokens per sequence in the KV cache. Required by `vram`; with the other kinds the plan states "
        "its GPU memory.",
    )
    sequences: int = Field(default=1, ge=1, description="Sequences in the KV cache.")
    kv_cache: Literal["auto", "bf16", "fp8"] = Field(
        default="auto", description="Type of the KV cache; `auto` is the model's own 16 bits."
    )
    margin: Margin = Field(
        default=0.15, description="Memory kept free for everything else: a share of the GPU memory, or bytes."
    )

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if sum(getattr(self, kind) is not None for kind in BUDGETS) != 1:
            raise ValueError("give exactly one of bpp, bytes and vram")
        fields = type(self).model_fields
        given = (name for name in ("sequences", "kv_cache", "margin") if getattr(self, name) != fields[name].default)
        if self.context is None and (self.vram is not None or any(given)):
            raise ValueError("context is missing: the KV cache is computed for so many tokens of every sequence")
        return self

    @property
    def target(self) -> str:
        """Its name in the run store, e.g. 5.5bpp."""
        if self.vram is not None:
            return f"{self.vram}B-vram-{self.sequences}x{self.context}-{self.kv_cache}"
        return f"{self.bpp:g}bpp" if self.bpp is not None else f"{self.bytes}B"


class ScaleSearchConfig(Section):
    """The search for the scale of each group that rounds its weights best."""

    grid: int = Field(default=32, ge=2, le=1024, description="Scales tried per group.")
    span: tuple[float, float] = Field(
        default=(0.5, 1.5),
        description="Smallest and largest scale tried, as multiples of the scale that fits the group's amax.",
    )

    @field_validator("span")
    @classmethod
    def _ordered(cls, span: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < span[0] < span[1] <= 1.5:
            raise ValueError("span must rise from above 0 to at most 1.5, the head-room of the global scale")
        return span


class GptqConfig(Section):
    """Rounding that compensates the error of each column in the columns after it."""

    damping: float = Field(
        default=0.01, gt=0.0, description="Added to the diagonal of the Hessian, as a share of the diagonal's mean."
    )


class RoundingConfig(Section):
    """How weights become codes."""

    scale_search: ScaleSearchConfig = Field(default_factory=ScaleSearchConfig, description="Search for group scales.")
    gptq: GptqConfig | None = Field(
        default_factory=GptqConfig, description="GPTQ after the search; `null` leaves it out."
    )
    equalize: bool = Field(default=True, description="Even out channels of inputs by factors in norms and weights.")


def _known_format(name: Any) -> Any:
    if name not in set(FormatName):
        raise ValueError(f"unknown format {name!r}{_nearest(str(name), list(FormatName))}")
    return name


class FormatRule(Section):
    """A format for part of the model."""

    match: str = Field(
        min_length=1,
        description="Glob on the names of Linears in the checkpoint, or of fused groups. A fused group has one format: "
        "a pattern that matches only some of its Linears is refused.",
    )
    format: Annotated[FormatName, BeforeValidator(_known_format)] = Field(description="The format.")


class LimitsConfig(Section):
    """The most time that a plan's Linears may take, by the roofline of a card; docs/budgets.md has the assumptions.

    1 is the fastest plan of any size. With one of them given, NVFP4A16 joins NVFP4 in `formats`.
    """

    prefill: float | None = Field(
        default=None, ge=1.0, description="Time of a prompt's token in a large batch, bound by products."
    )
    decode: float | None = Field(
        default=None, ge=1.0, description="Time of a generated token of a single sequence, bound by bytes."
    )
    gpu: GpuName = Field(default=GpuName.B200, description="The card; plans state both times without limits, too.")

    @property
    def given(self) -> bool:
        """Whether there is a limit."""
        return self.prefill is not None or self.decode is not None


class AllocationConfig(Section):
    """How a plan is chosen. No key changes a measurement, so a changed one needs no new run; limits add a format."""

    objective: Literal["token_fisher", "fisher_trace"] = Field(
        default="token_fisher",
        description="The price that a plan minimises; `fisher_trace` is that of diagonal-Fisher methods.",
    )
    mtp_weight: float = Field(
        default=0.1,
        ge=0.0,
        description="Weight of a draft (MTP) head's loss against the model's. A worse draft costs speed, not quality.",
    )
    force: tuple[FormatRule, ...] = Field(default=(), description="Exactly these formats.")
    floor: tuple[FormatRule, ...] = Field(
        default=(), description="These formats, or others with at least as many bits."
    )
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="Limits on time, beside the budget.")

    @model_validator(mode="before")
    @classmethod
    def _replaced(cls, values: Any) -> Any:
        if isinstance(values, dict) and "max_bf16_fraction" in values:
            raise ValueError("max_bf16_fraction is gone; limit the time that BF16 costs by limits: {prefill: 1.25}")
        return values


class EvaluationConfig(Section):
    """The text, unseen by the calibration, on which `quantize` and `sweep --measure` measure the quantized model."""

    text: Path = Field(description="Plain text file.")
    images: Path | None = Field(default=None, description="JSONL file of images with captions.")
    sequences: int = Field(default=24, ge=1, description="Number of sequences.")
    length: int = Field(default=512, ge=2, description="Tokens per sequence.")


class ClusterConfig(Section):
    """Where the run computes. Only `threads` and `device` affect results."""

    address: str = Field(
        default="auto",
        description="Ray cluster to join. `auto`: the one that RAY_ADDRESS or the submitted job names, else a Ray "
        "started on this machine. `local`: always one started on this machine.",
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto", description="Number of workers; `auto` is as many as fit."
    )
    threads: int = Field(
        default=1,
        ge=1,
        description="CPU cores per worker with `device: cpu`; a GPU's worker uses its share of the node's.",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto",
        description="`gpu`: a worker takes one GPU. `cpu`: `threads` cores. `auto`: GPUs if the cluster has any.",
    )
    placement: Literal["spread", "pack"] = Field(
        default="spread", description="Spread workers over nodes, or pack them on few."
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Ray labels of the nodes that may have workers.")
    blocks_per_shard: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto", description="Blocks a worker loads at a time; `auto` derives the number from `memory`."
    )
    memory: Literal["auto"] | Bytes = Field(
        default="auto",
        description="Most memory a worker may take on its device; `auto` is the free memory, shared by its workers. "
        "A worker that takes more than a given limit ends the run.",
    )
    wait: float = Field(default=0.0, ge=0.0, description="Seconds to wait for nodes from an autoscaler.")
    timeout: Literal["auto"] | Annotated[float, Field(gt=0.0)] = Field(
        default="auto", description="Seconds a call to a worker may take; `auto`: 300, or 20 times what such ones take."
    )


class StoreConfig(Section):
    """Where results are kept."""

    run: Location = Field(description="Run store: everything measured and encoded.")
    output: Location = Field(description="The finished repository.")

    @model_validator(mode="after")
    def _apart(self) -> StoreConfig:
        run, output = _segments(self.run), _segments(self.output)
        if run == output[: len(run)] or output == run[: len(output)]:
            raise ValueError(f"run {self.run} and output {self.output} must be separate directories")
        return self


def _segments(location: Path | str) -> tuple[str, ...]:
    return location.absolute().parts if isinstance(location, Path) else tuple(location.split("/"))


class Config(Section):
    """A whole run."""

    model: ModelConfig = Field(description="The model.")
    calibration: CalibrationConfig = Field(description="Calibration data.")
    formats: tuple[FormatName, ...] = Field(
        default=(FormatName.NVFP4, FormatName.FP8, FormatName.MXFP8, FormatName.BF16),
        description="Formats that every Linear is encoded in and the plan chooses from.",
    )
    budget: BudgetConfig = Field(description="Size of the result.")
    sweep: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(
        default=(4.5, 4.75, 5.0, 5.25, 5.5, 6.0, 7.0, 8.25),
        description="Budgets of `sweep`, in bits per quantizable parameter.",
    )
    allocation: AllocationConfig = Field(default_factory=AllocationConfig, description="Choice of the plan.")
    rounding: RoundingConfig = Field(default_factory=RoundingConfig, description="Rounding of weights.")
    evaluation: EvaluationConfig | None = Field(default=None, description="Evaluation data.")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="Workers and their machines.")
    store: StoreConfig = Field(description="Run store and output.")

    @field_validator("formats", mode="before")
    @classmethod
    def _known(cls, formats: Any) -> Any:
        for name in formats if isinstance(formats, list | tuple) else ():
            _known_format(name)
        return formats

    @field_validator("formats")
    @classmethod
    def _distinct(cls, formats: tuple[FormatName, ...]) -> tuple[FormatName, ...]:
        if not formats or len(set(formats)) != len(formats):
            raise ValueError("name at least one format, each once")
        return formats

    @property
    def paired_formats(self) -> tuple[FormatName, ...]:
        """`formats`, with NVFP4A16 after NVFP4: it has the same bytes, and costs time instead of loss."""
        if FormatName.NVFP4A16 in self.formats:
            return self.formats
        twin = {FormatName.NVFP4: (FormatName.NVFP4, FormatName.NVFP4A16)}
        return tuple(joined for name in self.formats for joined in twin.get(name, (name,)))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: the file or an override cannot be used; one line that names the key.
    """
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: expected sections such as model: and budget:")
    return checked(body, overrides, name=str(path))


def checked(body: dict[str, Any], overrides: Sequence[str] = (), *, name: str) -> Config:
    """The configuration that a parsed file and overrides give; ConfigError, beginning with `name`, if they do not."""
    for override in overrides:
        _apply(body, override)
    try:
        return Config.model_validate(body)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_first(error)}") from error


def _apply(body: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected key=value, e.g. --set budget.bpp=5.5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error
    *sections, leaf = key.split(".")
    node = body
    for section in sections:
        found = node.setdefault(section, {})
        if not isinstance(found, dict):
            raise ConfigError(f"--set {override}: {section} is not a section")
        node = found
    if sections == ["budget"] and leaf in BUDGETS:
        for kind in BUDGETS:  # one budget replaces another
            node.pop(kind, None)
    node[leaf] = value


def _first(error: ValidationError) -> str:
    entries = error.errors()
    entry = next((e for e in entries if e["type"] == "extra_forbidden"), entries[0])
    location = [
        str(part) for part in entry["loc"] if isinstance(part, int) or not part.startswith(("function-", "literal["))
    ]
    key = ".".join(location)
    if entry["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(location[-1], _keys(location[:-1]))}"
    if entry["type"] == "missing":
        return f"{key} is missing"
    message = entry["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _keys(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in path:
        if part.isdigit():  # of a list: its entries are sections of one kind
            continue
        annotation = section.model_fields[part].annotation
        section = next(
            (t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)), None
        )
        if section is None:
            return []
    return list(section.model_fields)


def _nearest(word: str, known: Sequence[str]) -> str:
    folded = {name.casefold(): str(name) for name in known}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.5)
    if found:
        return f"; did you mean {folded[found[0]]}?"
    return f"; known: {', '.join(str(name) for name in known)}" if known else ""
