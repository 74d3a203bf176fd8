"""How a plan is chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from prismaquant_ray.formats import FormatName
from prismaquant_ray.gpus import GpuName
from prismaquant_ray.settings.values import Section, nearest_known


def known_format(name: Any) -> Any:
    """The name of a format as it is; ValueError, with the nearest one, where there is none of that name."""
    if not isinstance(name, str) or name not in set(FormatName):
        raise ValueError(f"unknown format {name!r}{nearest_known(str(name), list(FormatName))}")
    return name


class FormatRule(Section):
    """A format for part of the model."""

    match: str = Field(
        min_length=1,
        description="Glob on the names of Linears in the checkpoint, or of fused groups. A fused group has one format: "
        "a pattern that matches only some of its Linears is refused.",
    )
    format: Annotated[FormatName, BeforeValidator(known_format)] = Field(description="The format.")


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
    refine: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Measure so many plans around the optimum on one half of `evaluation`, correct prices by what they "
        "show, solve again, and keep the result if it is better on the other half. 0: the plan by prices alone.",
    )

    @model_validator(mode="before")
    @classmethod
    def _replaced(cls, values: Any) -> Any:
        if isinstance(values, dict) and "max_bf16_fraction" in values:
            raise ValueError("max_bf16_fraction is gone; limit the time that BF16 costs by limits: {prefill: 1.25}")
        return values
