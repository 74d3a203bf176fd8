"""How weights become codes."""

from __future__ import annotations

from pydantic import Field, field_validator

from prismaquant_ray.settings.values import Section


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
