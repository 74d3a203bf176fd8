"""Values of settings as people write them: sizes, margins, places."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
#: Object stores that `store.run`, `store.output` and `model.source` may name.
SCHEMES = ("s3", "gs")


# What file systems take: of a path, and of a name between two slashes.
_LONGEST_PATH = 4000
_LONGEST_NAME = 255


class Section(BaseModel):
    """Unknown keys are errors; numbers are finite; values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _usable(self) -> Self:
        for name, value in self:
            if isinstance(value, int) and value.bit_length() > 63:
                raise ValueError(f"{name} has more than 64 bits")
            if isinstance(value, str | Path):
                text = str(value)
                if "\0" in text or len(text) > _LONGEST_PATH:
                    raise ValueError(f"{name} is no name: it has a NUL, or more than {_LONGEST_PATH} characters")
                if any(len(os.fsencode(part)) > _LONGEST_NAME for part in text.split("/")):
                    raise ValueError(f"{name} is no name: a part of it has more than {_LONGEST_NAME} bytes")
        return self


def parse_bytes(value: Any) -> Any:
    """19000000000 from 19GB (decimal) or 17.7GiB (binary); other types pass through to validation."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", value)
    if not found or found[2].upper() not in _UNITS:
        raise ValueError(f"{value!r} is not a size; write 19GB or 17.7GiB")
    try:
        return int(float(found[1]) * _UNITS[found[2].upper()])
    except OverflowError:
        raise ValueError(f"{value[:20]}… is more than any machine has") from None


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


def parse_margin(value: Any) -> Any:
    """A share (a float below 1) from 15% or 0.15, or bytes (an int) from 4GB."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip()[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0.0 <= share < 1.0:
            raise ValueError(f"{value!r} is not a share; write 15%, or bytes as 4GB")
        return share
    if isinstance(value, float) and 0.0 <= value < 1.0:
        return value
    size = parse_bytes(value)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"{value!r} is not a margin; write 15%, or bytes as 4GB")
    return size


Margin = Annotated[float | int, BeforeValidator(parse_margin)]


def parse_location(value: Any) -> Any:
    """A URI of an object store as it is, anything else as a local path."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value.strip():
        uris = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"{value!r} is no place; give a directory or a URI of {uris}")
    scheme, separator, rest = value.partition("://")
    if not separator:
        return Path(value)
    if scheme == "file":
        return Path(rest)
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme}:// is not supported; give a directory or one of {', '.join(SCHEMES)}://")
    return value.rstrip("/")


Location = Annotated[Path | str, BeforeValidator(parse_location)]


def nearest_known(word: str, known: Sequence[str]) -> str:
    """What to add to a message about an unknown word: the known one it looks like, or all of them."""
    folded = {name.casefold(): str(name) for name in known}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.5)
    if found:
        return f"; did you mean {folded[found[0]]}?"
    return f"; known: {', '.join(str(name) for name in known)}" if known else ""
