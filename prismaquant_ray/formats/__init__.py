"""The registry of formats: their names, and one file per format with everything else about it.

Importing the registry imports no format: the configuration, `status` and the command line's help know the names and
start without torch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prismaquant_ray.formats.base import Codec, Format

__all__ = ["FORMATS", "FormatName", "codec_named", "codecs_of"]


class FormatName(StrEnum):
    """The names that users write in `formats:`, in order of size; each is the name of a file, in lower case."""

    INT3A16 = "INT3A16"
    INT4 = "INT4"
    INT4A8 = "INT4A8"
    MXFP4 = "MXFP4"
    MXFP4A8 = "MXFP4A8"
    NVFP4 = "NVFP4"
    NVFP4A16 = "NVFP4A16"
    INT6A16 = "INT6A16"
    FP8_BLOCK = "FP8_BLOCK"
    FP8 = "FP8"
    INT8 = "INT8"
    INT8A16 = "INT8A16"
    MXFP8 = "MXFP8"
    BF16 = "BF16"


class _Registry(Mapping[FormatName, "Format"]):
    """Formats by name, in order of size; each is imported when it is first asked for."""

    def __getitem__(self, name: FormatName) -> Format:
        if name not in FormatName.__members__:
            raise KeyError(name)
        module = importlib.import_module(f"{__name__}.{name.lower()}")
        format_: Format = module.FORMAT
        return format_

    def __iter__(self) -> Iterator[FormatName]:
        return iter(FormatName)

    def __len__(self) -> int:
        return len(FormatName)


FORMATS: Mapping[FormatName, Format] = _Registry()


def codecs_of(names: Iterable[FormatName]) -> dict[str, Codec]:
    """Distinct codecs behind the formats, by name: NVFP4 and NVFP4A16 share one."""
    found = (FORMATS[name].codec for name in names)
    return {codec.name: codec for codec in found if codec is not None}


@functools.cache
def codec_named(name: str) -> Codec:
    """The codec that calls itself so; KeyError when there is none."""
    return codecs_of(FormatName)[name]
