"""Where results are kept."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from prismaquant_ray.settings.values import Location, Section


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
