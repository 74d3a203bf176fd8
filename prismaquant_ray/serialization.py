"""Dataclasses as JSON: the only writer and the only reader of records, findings and results.

JSON of another shape is refused, not repaired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from prismaquant_ray.formats import FormatName
from prismaquant_ray.parsing import parse_object

T = TypeVar("T")

# Building one takes longer than reading many records with it.
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def to_json(record: Any) -> dict[str, Any]:
    """A record as plain JSON values, its keys in the order of its fields.

    A field that is None by default is left out where it is None: not every model has a draft head.
    """
    return {
        field.name: _plain(value)
        for field in fields(record)
        if not ((value := getattr(record, field.name)) is None and field.default is None)
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_json(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, FormatName) else value


def from_json(kind: type[T], body: Mapping[str, Any]) -> T:
    """A record from JSON values.

    Raises:
        ValueError: the values are not those of such a record; the message names the first that is not.
    """
    try:
        if kind not in _ADAPTERS:
            _ADAPTERS[kind] = TypeAdapter(kind)
        record: T = _ADAPTERS[kind].validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or kind.__name__}: {first['msg']}") from error
    return record


def to_bytes(record: Any) -> bytes:
    """A record as the run store keeps it."""
    return json.dumps(to_json(record), indent=1, allow_nan=False).encode()


def from_bytes(kind: type[T], data: bytes) -> T:
    """The record that bytes hold.

    Raises:
        ValueError: the bytes are not JSON, or not that of such a record.
    """
    return from_json(kind, parse_object(data, finite=True))
