"""The reference of the configuration, from its schema.

`python -m docs.configuration > docs/configuration.md` writes it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
import yaml
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from prismaquant_ray import config
from prismaquant_ray.config import Config

_INTRODUCTION = """\
# Configuration

<!-- From the schema in prismaquant_ray/config.py, by `python -m docs.configuration > docs/configuration.md`. -->

One YAML file, read by every command. Unknown keys and values out of bounds are refused, by name, before anything runs;
`--set section.key=value` overrides one key for one command; one kind of `budget` given so replaces the other.
A key without a default has to be given.
"""
#: Where a section is described.
Places = Mapping[type[BaseModel], str]

# What is written, where the type alone does not say it: by the function that reads it.
_READ = {
    config.parse_bytes: "bytes, as a number, `19GB` or `17.7GiB`",
    config.parse_margin: "share, as `15%` or `0.15`, or bytes, as `4GB`",
    config.parse_location: "directory, `s3://…` or `gs://…`",
}
_PLAIN: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    Path: "path",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key of a section: what may be written, its default as YAML (None where it has to be given), its bounds."""

    name: str
    type: str
    default: str | None
    bounds: tuple[at.BaseMetadata, ...]
    description: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SectionReference:
    """A section by its dotted path; of an entry of a list the path ends in `[]`."""

    path: str
    meaning: str
    keys: tuple[Key, ...]


def sections(model: type[BaseModel] = Config, path: str = "") -> Iterator[SectionReference]:
    """A model's own keys, then every section below it, in the schema's order."""
    # A section that several keys hold is described below the first of them.
    below: dict[type[BaseModel], str] = {}
    for name, field in model.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None:
            place = f"{path}.{name}" if path else name
            below.setdefault(inner, f"{place}[]" if get_origin(field.annotation) is tuple else place)
    yield SectionReference(
        path=path,
        meaning=inspect.cleandoc(model.__doc__ or ""),
        keys=tuple(_key(name, field, below) for name, field in model.model_fields.items()),
    )
    for inner, place in below.items():
        yield from sections(inner, place)


def _key(name: str, field: FieldInfo, places: Places) -> Key:
    annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return Key(
        name=name,
        type=_type(annotation, places),
        default=None if field.is_required() else _default(field),
        bounds=tuple(_bounds(annotation)),
        description=field.description,
    )


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "that of each key"
    plain = to_jsonable_python(value)
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
    return f"`{text}`"


def _type(annotation: Any, places: Places) -> str:
    """What may be written for a type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        read = next((_READ[m.func] for m in arguments[1:] if isinstance(m, BeforeValidator) and m.func in _READ), None)
        return read or _type(arguments[0], places)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(argument, places) for argument in arguments)
    if annotation is NoneType:
        return "`null`"
    if origin is tuple:
        members = [argument for argument in arguments if argument is not Ellipsis]
        count = "" if Ellipsis in arguments else f"{len(members)} × "
        return f"list of {count}{_type(members[0], places)}"
    if origin is dict:
        return f"map from {_type(arguments[0], places)} to {_type(arguments[1], places)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        place = places[annotation]
        return f"[`{place}`](#{re.sub(r'[^a-z_]', '', place)})"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    return _PLAIN[annotation]


def _bounds(annotation: Any) -> Iterator[at.BaseMetadata]:
    """Bounds of a value, or of what a list or a choice of types holds."""
    if get_origin(annotation) is Literal:
        return
    for entry in get_args(annotation):
        if isinstance(entry, FieldInfo):
            yield from (found for found in entry.metadata if isinstance(found, at.BaseMetadata))
        elif isinstance(entry, at.BaseMetadata):
            yield entry
        elif get_origin(entry) is not None:
            yield from _bounds(entry)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, by itself, in a list, or unless it is null."""
    for entry in (annotation, *get_args(annotation)):
        if isinstance(entry, type) and issubclass(entry, BaseModel):
            return entry
    return None


def _shown(bound: at.BaseMetadata) -> str:
    match bound:
        case at.Gt(gt=value):
            return f"> {value:g}"
        case at.Ge(ge=value):
            return f"≥ {value:g}"
        case at.Lt(lt=value):
            return f"< {value:g}"
        case at.Le(le=value):
            return f"≤ {value:g}"
        case at.MinLen(min_length=1):
            return "not empty"
    raise TypeError(f"{bound} has no words yet; add some here")


def render(model: type[BaseModel] = Config) -> str:
    """docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section in sections(model):
        if section.path:
            parts.append(f"{'#' * (section.path.count('.') + 2)} `{section.path}`\n\n{section.meaning}\n")
        columns = {
            "key": [f"`{key.name}`" for key in section.keys],
            "value": [key.type for key in section.keys],
            "default": [key.default or "**required**" for key in section.keys],
            "bounds": [", ".join(map(_shown, key.bounds)) for key in section.keys],
            "meaning": [key.description or "" for key in section.keys],
        }
        there = {title: cells for title, cells in columns.items() if any(cells)}
        rows = [tuple(there), ("---",) * len(there), *zip(*there.values(), strict=True)]
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render())
