"""Markdown from untrusted text, escaped so that it is not parsed as Markdown, HTML or the end of a table cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 200
# An underscore between letters is literal in every Markdown dialect.
_SPECIAL = re.compile(r"([\\`*\[\]<>|#&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def line(text: str) -> str:
    """One line of printable text, truncated to `LONGEST`."""
    found = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return found if len(found) <= LONGEST else f"{found[: LONGEST - 1]}…"


def escaped(value: Any) -> Any:
    """Text on one line with Markdown and HTML escaped; other values, and Markdown, are returned unchanged."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    return Markdown(_SPECIAL.sub(r"\\\1", line(value)))


def code(text: str) -> Markdown:
    """A code span. `|` becomes `¦`, because it would end a table cell."""
    text = line(text).replace("|", "¦") or "?"
    if "`" not in text:
        return Markdown(f"`{text}`")
    fence = _fence(text, 1)
    return Markdown(f"{fence} {text} {fence}")


def fenced(text: str, language: str) -> Markdown:
    """A block of code."""
    fence = _fence(text, 3)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]], *, words: int) -> Markdown:
    """A table; columns after the first `words` are numbers, aligned right."""
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    lines = [_row(titles), f"|{'|'.join(rule)}|", *(_row(row) for row in rows)]
    return Markdown("\n".join(lines))


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(escaped(cell)) for cell in cells)} |"


def _fence(text: str, least: int) -> str:
    """A fence longer than any run of backticks in the text."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
