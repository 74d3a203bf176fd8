"""Metadata from the source's own card, used only where it is well-formed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but in no __all__

from prismaquant_ray.parsing import MalformedError, parse_yaml
from prismaquant_ray.report.markdown import line

# Entries of a list in the source's front matter that are taken over.
_ENTRIES = 8
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_WORD = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stated:
    """Front matter of the source's card; `problem` says why there is none, else None.

    `quantized_from` are base models that the source is a quantization of, `derived_from` other base models.
    """

    problem: str | None = None
    license: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    quantized_from: tuple[str, ...] = ()
    derived_from: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    pipeline_tag: str | None = None


def stated(readme: str | None) -> Stated:
    """Licence, base model, language and task from a README.md; malformed values are left out."""
    if readme is None:
        return Stated(problem="the source has no README.md")
    found = _FRONT_MATTER.match(readme.removeprefix("\ufeff"))
    if found is None:
        return Stated(problem="the source's README.md has no metadata")
    try:
        body = parse_yaml(found[1])
    except MalformedError:
        body = None
    if not isinstance(body, dict):
        return Stated(problem="the metadata of the source's README.md cannot be read")
    bases = tuple(name for name in _strings(body.get("base_model")) if _is_hub_id(name))
    same = body.get("base_model_relation") == "quantized"
    return Stated(
        license=tuple(name for name in _strings(body.get("license")) if _WORD.fullmatch(name)),
        license_name=next(iter(_strings(body.get("license_name"))), None),
        license_link=next(iter(_strings(body.get("license_link"))), None),
        quantized_from=bases if same else (),
        derived_from=() if same else bases,
        language=_strings(body.get("language")),
        pipeline_tag=next((tag for tag in _strings(body.get("pipeline_tag")) if _WORD.fullmatch(tag)), None),
    )


def _strings(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(line(entry) for entry in values[:_ENTRIES] if isinstance(entry, str) and entry.strip())


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
