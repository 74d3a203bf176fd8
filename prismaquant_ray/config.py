"""The configuration: one typed tree, one default for every setting, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from prismaquant_ray.errors import ConfigError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.parsing import MalformedError, parse_yaml, read_yaml
from prismaquant_ray.settings.allocation import AllocationConfig, known_format
from prismaquant_ray.settings.budget import BUDGETS, BudgetConfig
from prismaquant_ray.settings.cluster import ClusterConfig
from prismaquant_ray.settings.data import CalibrationConfig, EvaluationConfig
from prismaquant_ray.settings.model import ModelConfig
from prismaquant_ray.settings.rounding import RoundingConfig
from prismaquant_ray.settings.store import StoreConfig
from prismaquant_ray.settings.texts import STDIN
from prismaquant_ray.settings.values import Section, nearest_known

#: Type of the KV cache, as it is set.
KvCacheSetting = Literal["bf16", "fp8", "auto"]


class Config(Section):
    """A whole run."""

    model: ModelConfig = Field(description="The model.")
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig, description="Calibration data.")
    formats: tuple[FormatName, ...] = Field(
        default=(FormatName.NVFP4, FormatName.FP8, FormatName.MXFP8, FormatName.BF16),
        description="Formats that every Linear is encoded in and the plan chooses from.",
    )
    budget: BudgetConfig = Field(description="Size of the result.")
    kv_cache: KvCacheSetting = Field(
        default="bf16",
        description="Type of the KV cache: the model's own 16 bits; FP8, with scales in the repository; or, within a "
        "`vram` budget, whichever loses less with the weights that then fit.",
    )
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
            known_format(name)
        return formats

    @field_validator("formats")
    @classmethod
    def _distinct(cls, formats: tuple[FormatName, ...]) -> tuple[FormatName, ...]:
        if not formats or len(set(formats)) != len(formats):
            raise ValueError("name at least one format, each once")
        return formats

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.allocation.refine and self.evaluation is None:
            raise ValueError("allocation.refine needs evaluation: {text: FILE}, or evaluation: {}, the mix")
        if self.allocation.refine and self.allocation.objective != "token_fisher":
            raise ValueError("allocation.refine corrects prices of token_fisher; leave allocation.objective out")
        return self

    @model_validator(mode="after")
    def _one_reader(self) -> Self:
        """Standard input can be read once."""
        evaluated = () if self.evaluation is None else self.evaluation.text
        if all(any(text.path == STDIN for text in texts) for texts in (self.calibration.text, evaluated)):
            raise ValueError("calibration.text and evaluation.text both read standard input; put one of them in a file")
        return self

    @model_validator(mode="after")
    def _decidable(self) -> Self:
        if self.kv_cache == "auto" and self.budget.vram is None:
            raise ValueError(
                "kv_cache: auto needs budget.vram: elsewhere a smaller cache buys nothing; write bf16 or fp8"
            )
        return self

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
        body = read_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except MalformedError as error:
        raise ConfigError(f"{path} {error}") from error
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
        value = parse_yaml(text)
    except MalformedError as error:
        raise ConfigError(f"--set {override[:100]}: the value {error}") from error
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
    location = _location(entry)
    key = ".".join(location)
    if entry["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest_known(location[-1], _keys(location[:-1]))}"
    if entry["type"] == "missing":
        return f"{key} is missing"
    # Of a value of several types each one says why it is none.
    messages = dict.fromkeys(_message(e) for e in entries if _location(e) == location)
    message = " or ".join(
        [next(iter(messages)), *(later.removeprefix("Input should be ") for later in [*messages][1:])]
    )
    return f"{key}: {message}" if key else message


def _message(entry: ErrorDetails) -> str:
    return entry["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]


def _location(entry: ErrorDetails) -> list[str]:
    """Where a value is; pydantic also names the branch of a type, which no person wrote."""
    return [
        str(part) for part in entry["loc"]
        if isinstance(part, int) or not part.startswith(("function-", "literal[", "constrained-"))
    ]  # fmt: skip


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
