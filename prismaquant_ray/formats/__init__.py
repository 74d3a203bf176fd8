"""The registry of formats: one file a format, listed here in order of size."""

from __future__ import annotations

from collections.abc import Iterable

from prismaquant_ray.formats import bf16, fp8, int4, mxfp4, mxfp8, nvfp4, nvfp4a16
from prismaquant_ray.formats.base import Codec, Format, FormatName, Rounded, experts_of, stack

__all__ = ["FORMATS", "Codec", "Format", "FormatName", "Rounded", "codecs_of", "experts_of", "get_format", "stack"]

FORMATS: dict[FormatName, Format] = {
    module.FORMAT.name: module.FORMAT for module in (int4, mxfp4, nvfp4, nvfp4a16, fp8, mxfp8, bf16)
}


def get_format(name: FormatName | str) -> Format:
    """The format of that name; raises KeyError or ValueError for names that configuration has not checked."""
    return FORMATS[FormatName(name)]


def codecs_of(names: Iterable[FormatName]) -> dict[str, Codec]:
    """Distinct codecs behind the formats, by name: NVFP4 and NVFP4A16 share one."""
    found = (FORMATS[name].codec for name in names)
    return {codec.name: codec for codec in found if codec is not None}
