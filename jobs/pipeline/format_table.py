"""The table of formats: storage, runtime requirements, and the number of groups of a model that can take each."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.pipeline.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.formats import FORMATS
from prismaquant_ray.formats.base import Served
from prismaquant_ray.formats.fitting import refusal

_EXAMPLE = (4096, 4096)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatEntry:
    """A format; `groups` of `of` fused groups can take it, None without a model."""

    format: str
    bits: float
    compression: str
    summary: str
    served_by: Served
    groups: int | None = None
    of: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatTable:
    """Every format, in order of size."""

    formats: list[FormatEntry]


def format_table(config: Config | None) -> FormatTable:
    """Every format; with a configuration also the number of fused groups of its model that can take each."""
    groups = None if config is None else Run(config).layout.groups
    return FormatTable(
        formats=[
            FormatEntry(
                format=str(name),
                bits=format_.bits(*_EXAMPLE),
                compression=format_.compression,
                summary=format_.summary,
                served_by=format_.served,
                groups=None if groups is None else sum(refusal(name, group) is None for group in groups),
                of=None if groups is None else len(groups),
            )
            for name, format_ in FORMATS.items()
        ]
    )
