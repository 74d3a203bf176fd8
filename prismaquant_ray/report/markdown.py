"""Markdown from text that may hold anything: nothing of it is read as Markdown, HTML or the end of a table's cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 200
# An underscore between letters is one in every Markdown.
_SPECIAL = re.compile(r"([\\`*\[\]<>|#&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def line(text: str) -> str:
    """One line of printable text, cut where nobody reads on."""
    found = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return found if len(found) <= LONGEST else f"{found[: LONGEST - 1]}…"


def escaped(value: Any) -> Any:
    """Text on one line with every sign that Markdown or HTML would read; what is no text, or Markdown, as it is."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    return Markdown(_SPECIAL.sub(r"\\\1", line(value)))


def code(text: str) -> Markdown:
    """A code span. A bar becomes a broken one: inside a table it would end the cell, and outside it needs no escape."""
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
    """A table whose first `words` columns are text and the others numbers, to the right."""
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    lines = [_row(titles), f"|{'|'.join(rule)}|", *(_row(row) for row in rows)]
    return Markdown("\n".join(lines))


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(escaped(cell)) for cell in cells)} |"


def _fence(text: str, least: int) -> str:
    """Backticks, more than the text has in a row."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
