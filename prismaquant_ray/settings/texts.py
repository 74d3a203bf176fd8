"""Sources of text: what `calibration.text` and `evaluation.text` hold."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_serializer

from prismaquant_ray.settings.values import Section, nearest_known

#: The text that comes with the project, one kind each; `mix:all` is all of them in equal shares.
MIX = "mix:"
MIX_KINDS = ("chat", "code", "mathematics", "languages", "prose", "lists")
MIX_ALL = f"{MIX}all"
STDIN = "-"
#: Rows that a program gave to a function of the library: no file names them.
PYTHON = "python:"
#: A dataset of the hub.
HUB = "hf://"
HUB_FORM = "hf://datasets/ORG/NAME[@REVISION][:CONFIG][:SPLIT]"
_HUB = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?"
)
# Shares are written by hand: 0.333 three times is meant to be all.
_SLACK = 0.0051


class TextSource(Section):
    """A source of text, or in short only its `path`."""

    path: str = Field(
        min_length=1,
        description="`.txt`; `.jsonl` or `.parquet` with rows; `hf://datasets/…`; `-`, standard input; `mix:all`, what "
        "comes with the project, or one kind of it, as `mix:code`.",
    )
    share: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Share of the sequences. What is left is divided evenly among the others.",
    )

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    @field_validator("path")
    @classmethod
    def _known(cls, path: str) -> str:
        if path.startswith(MIX) and path != MIX_ALL and path.removeprefix(MIX) not in MIX_KINDS:
            raise ValueError(f"unknown kind {path!r}{nearest_known(path, [f'{MIX}{k}' for k in ('all', *MIX_KINDS)])}")
        if path.startswith(HUB):
            hub_parts(path)
        elif "://" in path:
            raise ValueError(f"{path}: text is read from files and from {HUB_FORM}")
        return path

    @model_serializer
    def _short(self) -> str | dict[str, Any]:
        return self.path if self.share is None else {"path": self.path, "share": self.share}

    @property
    def name(self) -> str:
        """What it is called where its place says nothing: the file name alone of a file."""
        special = {STDIN: "standard input", PYTHON: "rows given by a program"}
        return Path(self.path).name if self.is_file else special.get(self.path, self.path)

    @property
    def is_file(self) -> bool:
        """Whether it is a file of this machine."""
        return self.path != STDIN and not self.path.startswith((MIX, PYTHON, HUB))


def hub_parts(uri: str) -> tuple[str, str | None, str | None, str]:
    """Name, revision, config and split of a dataset of the hub; ValueError where the form is another."""
    found = _HUB.fullmatch(uri)
    if found is None:
        raise ValueError(f"{uri!r} names no dataset; write {HUB_FORM}")
    return found["name"], found["revision"], found["config"] or None, found["split"] or "train"


def parse_texts(value: Any) -> Any:
    """One source or a list of them, each as a section or in short, as sections."""
    if isinstance(value, str | Path | Mapping | TextSource):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{str(value)[:60]!r} is no source of text; give a path or a list of sources")  # noqa: TRY004
    return tuple({"path": str(each)} if isinstance(each, str | Path) else each for each in value)


def _consistent(texts: tuple[TextSource, ...]) -> tuple[TextSource, ...]:
    if not texts:
        raise ValueError("name at least one source")
    seen: set[str] = set()
    for text in texts:
        if text.path in seen:
            raise ValueError(f"{text.path} is named twice")
        seen.add(text.path)
    shares_of(texts)
    return texts


Texts = Annotated[tuple[TextSource, ...], BeforeValidator(parse_texts), AfterValidator(_consistent)]


def names_of(texts: tuple[TextSource, ...]) -> str:
    """What sources are called together."""
    return ", ".join(text.name for text in texts)


def shares_of(texts: tuple[TextSource, ...]) -> list[float]:
    """The share of every source, 1 in all: what is not given is divided evenly.

    Raises:
        ValueError: the given ones are more than 1, or all are given and are less, or nothing is left for the others.
    """
    given = [text.share for text in texts if text.share is not None]
    total, others = math.fsum(given), len(texts) - len(given)
    if total > 1 + (0 if others else _SLACK):
        raise ValueError(f"the shares are {total:g} in all; they are parts of 1")
    if not others and total < 1 - _SLACK:
        raise ValueError(f"the shares are {total:g} in all; make them 1, or leave one out to take the rest")
    if others and total > 1 - 1e-9:
        lacking = next(text.path for text in texts if text.share is None)
        raise ValueError(f"the shares are {total:g} already, which leaves nothing for {lacking}")
    if not others:
        return [share / total for share in given]
    return [(1 - total) / others if text.share is None else text.share for text in texts]
