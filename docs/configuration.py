"""The reference of the configuration, from its schema: `python docs/configuration.py > docs/configuration.md`."""

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
from pydantic import BaseModel, BeforeValidator, TypeAdapter
from pydantic.fields import FieldInfo

from prismaquant_ray import config
from prismaquant_ray.settings import texts, values

_INTRODUCTION = """\
# Configuration

<!-- From the schema in prismaquant_ray/settings/, by `python docs/configuration.py > docs/configuration.md`. -->

One YAML file, read by every command. Unknown keys and values out of bounds are refused, by name, before anything runs.
`--set section.key=value` overrides one key for one command. One kind of `budget` given this way replaces the other.
Keys without a default are required.
"""
_COLUMNS = ("key", "value", "default", "bounds", "meaning")
# Types whose text is parsed: the validator that reads it tells them apart.
_PARSED = {
    values.parse_bytes: "bytes, as a number, `19GB` or `17.7GiB`",
    values.parse_margin: "share, as `15%` or `0.15`, or bytes, as `4GB`",
    values.parse_location: "directory, `s3://…` or `gs://…`",
    texts.parse_texts: "text, or list of sources, see below",
}
_PLAIN: Mapping[Any, str] = {
    str: "text", int: "whole number", float: "number", bool: "`true` or `false`", Path: "path", NoneType: "`null`"
}  # fmt: skip
_SYMBOLS = {at.Gt: ">", at.Ge: "≥", at.Lt: "<", at.Le: "≤"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key of a section: its values in words, its default as YAML (None where it is required), bounds and meaning."""

    name: str
    type: str
    default: str | None
    bounds: tuple[at.BaseMetadata, ...]
    meaning: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SectionReference:
    """A section by its dotted path, which ends in `[]` for an entry of a list."""

    path: str
    meaning: str
    keys: tuple[Key, ...]


def sections(
    model: type[BaseModel] = config.Config, path: str = "", known: dict[type[BaseModel], str] | None = None
) -> Iterator[SectionReference]:
    """A model's own keys, then every section below it, in the schema's order."""
    # A section that several keys hold is described below the first of them.
    paths = {} if known is None else known
    before = {*paths}
    for name, field in model.model_fields.items():
        for held in (field.annotation, *get_args(field.annotation)):
            if isinstance(held, type) and issubclass(held, BaseModel):
                paths.setdefault(held, f"{path}.{name}".lstrip(".") + "[]" * (get_origin(field.annotation) is tuple))
    keys = tuple(_key(name, field, paths) for name, field in model.model_fields.items())
    yield SectionReference(path=path, meaning=inspect.cleandoc(model.__doc__ or ""), keys=keys)
    for section, place in [entry for entry in paths.items() if entry[0] not in before]:
        yield from sections(section, place, paths)


def _key(name: str, field: FieldInfo, paths: Mapping[type[BaseModel], str]) -> Key:
    annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    plain = TypeAdapter(Any).dump_python(default, mode="json")
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("\n...\n")
    shown = "see there" if isinstance(default, BaseModel) else f"`{text.strip()}`"
    return Key(
        name=name,
        type=_type(annotation, paths),
        default=None if field.is_required() else shown,
        bounds=tuple(_bounds(annotation)),
        meaning=field.description or "",
    )


def _type(annotation: Any, paths: Mapping[type[BaseModel], str]) -> str:
    """The values of a type, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        parsed = (_PARSED[m.func] for m in arguments[1:] if isinstance(m, BeforeValidator) and m.func in _PARSED)
        return next(parsed, None) or _type(arguments[0], paths)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(argument, paths) for argument in arguments)
    if origin is tuple:
        return f"list of {'' if Ellipsis in arguments else f'{len(arguments)} × '}{_type(arguments[0], paths)}"
    if origin is dict:
        return f"map from {_type(arguments[0], paths)} to {_type(arguments[1], paths)}"
    if annotation in paths:
        return f"[`{paths[annotation]}`](#{re.sub(r'[^a-z_]', '', paths[annotation])})"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    return _PLAIN[annotation]


def _bounds(annotation: Any) -> Iterator[at.BaseMetadata]:
    """Bounds of a value, or of the entries of a list or the members of a choice of types."""
    for entry in () if get_origin(annotation) is Literal else get_args(annotation):
        if isinstance(entry, at.BaseMetadata):
            yield entry
        elif isinstance(entry, FieldInfo):
            yield from (found for found in entry.metadata if isinstance(found, at.BaseMetadata))
        else:
            yield from _bounds(entry)


def _shown(bound: at.BaseMetadata) -> str:
    if bound == at.MinLen(1):
        return "not empty"
    if type(bound) not in _SYMBOLS:
        raise TypeError(f"{bound} has no words yet; add some here")
    return f"{_SYMBOLS[type(bound)]} {getattr(bound, type(bound).__name__.lower()):g}"


def render(model: type[BaseModel] = config.Config) -> str:
    """docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section in sections(model):
        if section.path:
            parts.append(f"{'#' * (section.path.count('.') + 2)} `{section.path}`\n\n{section.meaning}\n")
        rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
        for key in section.keys:
            bounds = ", ".join(map(_shown, key.bounds))
            rows.append((f"`{key.name}`", key.type, key.default or "**required**", bounds, key.meaning))
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render())
