"""Text that somebody else may have written, as values: the only place that reads JSON and YAML.

Everything is bounded before it can cost anything: bytes, values, depth. What passes can be walked by recursion, written
again as UTF-8, and, where `finite`, be computed with.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path


#: Bytes of a file that is read as a whole. The largest index of a model of today has a third of that.
MAX_BYTES = 1 << 26
# Of YAML, whose reader takes seconds for a megabyte.
_MAX_YAML = 1 << 18
# Values in it, by which memory is bounded: an empty list takes three bytes as text and sixty in memory. The largest
# tokenizer of today has two thirds of that.
_MAX_VALUES = 3 << 20
# Levels of lists and objects. Configurations have less than ten.
_MAX_DEPTH = 64
_INT64 = 1 << 63


class MalformedError(ValueError):
    """Text that cannot be read. The message says why, to be put behind the name of the file: `is not JSON (…)`."""


def parse_json(text: bytes | str, *, finite: bool = False, unique: bool = False) -> Any:
    """The values that JSON text holds.

    Where `finite`, every number is finite and has at most 64 bits. `unique` refuses an object with a name twice.

    Raises:
        MalformedError: it is no JSON, or there is too much of it.
    """
    check_volume(text)
    try:
        body = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise MalformedError(_TOO_DEEP) from error
    except MalformedError:
        raise
    except ValueError as error:
        reason = str(error) if text else "it is empty"
        raise MalformedError(f"is not JSON ({reason})") from error
    _check(body, finite=finite)
    return body


def check_volume(text: bytes | str) -> None:
    """MalformedError for JSON text of too many bytes or values, without reading it: commas and brackets are counted."""
    check_length(len(text), MAX_BYTES)
    if len(text) <= _MAX_VALUES:
        return
    data = text.encode(errors="replace") if isinstance(text, str) else text
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
        raise MalformedError(f"has more than {_MAX_VALUES:,} values")


def parse_object(text: bytes | str, *, finite: bool = False) -> dict[str, Any]:
    """The JSON object that text holds; MalformedError as `parse_json`, and where it is something else."""
    return as_object(parse_json(text, finite=finite))


def as_object(body: Any) -> dict[str, Any]:
    """The value, if it is a JSON object; MalformedError if not."""
    if not isinstance(body, dict):
        raise MalformedError("is not a JSON object")
    return body


def parse_yaml(text: str) -> Any:
    """The values that YAML text holds. Tags make nothing but plain values.

    Raises:
        MalformedError: it is no YAML, or there is too much of it, aliases included.
    """
    check_length(len(text), _MAX_YAML)
    try:
        body = yaml.safe_load(text)
    except RecursionError as error:
        raise MalformedError(_TOO_DEEP) from error
    # ValueError, TypeError: a date that is none, a key that is a list.
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise MalformedError(f"is not YAML ({' '.join(str(error).split())})") from error
    _check(body, finite=False)
    return body


def read_yaml(path: Path) -> Any:
    """The values of a YAML file, as `parse_yaml` has them; OSError when it cannot be read."""
    # Reading a pipe that nobody writes to would never end.
    if path.exists() and not path.is_file():
        raise MalformedError("is not a file")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedError(f"is not UTF-8 text (byte {error.start:,})") from error


def check_length(found: int, at_most: int) -> None:
    """MalformedError for more bytes than are read."""
    if found > at_most:
        raise MalformedError(f"has {found:,} bytes, of which at most {at_most:,} are read")


_TOO_DEEP = f"is nested deeper than {_MAX_DEPTH} levels"


def _check(body: Any, *, finite: bool) -> None:
    """Level by level: what is nested too deep for recursion would be so for everything after it, too."""
    level, seen = [body], 0
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if not value.isascii():
                    _check_text(value)
            elif isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list | tuple | set):
                inner += value
            elif finite:
                _check_number(value)
            # Aliases of YAML are one value in memory and many for those who walk over them.
            if seen + len(inner) > _MAX_VALUES:
                raise MalformedError(f"has more than {_MAX_VALUES:,} values")
        if not inner:
            return
        level, seen = inner, seen + len(inner)
    raise MalformedError(_TOO_DEEP)


def _check_number(value: Any) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise MalformedError(f"has a number that is {value}")
    elif isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise MalformedError("has a number with more than 64 bits")


def _check_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MalformedError("has half of a character (a lone surrogate)") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise MalformedError("has a name twice in one object")
    return body
