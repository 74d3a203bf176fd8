"""What the sources of text hold: plain text, or rows, each with the digest of its content.

Rows are read here and looked at in `rows`, when they are drawn. A run is identified by content: two paths to the same
text are one source.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from prismaquant_ray.calibration.files import check_file, read_text
from prismaquant_ray.calibration.mix import mix_rows
from prismaquant_ray.errors import InputError
from prismaquant_ray.parsing import MalformedError, parse_object
from prismaquant_ray.settings.texts import HUB, MIX, MIX_ALL, MIX_KINDS, PYTHON, STDIN, TextSource

#: What a row is made of: the line of a file, or values.
RawRow = str | Mapping[str, object]
#: What a program gives as text: whole texts, or rows as a `.jsonl` has them.
GivenText = Iterable[RawRow]
#: Which of its two parts the mix gives.
Part = Literal["calibration", "evaluation"]

# A larger file is not read whole only for a few megabytes of it.
_LARGEST = 1 << 30
_ROW_FILES = (".jsonl", ".parquet")
# Formats that people have rows in and that would pass as plain text.
_NOT_TEXT = {
    ".json": "one object a line, as .jsonl",
    ".ndjson": "the ending .jsonl",
    ".csv": "rows as .jsonl",
    ".tsv": "rows as .jsonl",
}
# Lines by which rows are told from text.
_SNIFFED = 3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadText:
    """A source, read: its plain text, or its rows with a place for each that messages name."""

    name: str
    digest: str
    plain: str | None = None
    rows: Sequence[tuple[str, RawRow]] = ()

    @property
    def sample(self) -> str:
        """All of it as one text, to compare tokenizers on."""
        if self.plain is not None:
            return self.plain
        return "\n".join(row if isinstance(row, str) else canonical(row, where) for where, row in self.rows)


class TextReader:
    """Reads sources, each one once: standard input and iterators have nothing to give a second time.

    `given` are rows of a program, for calibration and evaluation.
    """

    def __init__(self, *, calibration: GivenText | None = None, evaluation: GivenText | None = None) -> None:
        self._given: dict[Part, GivenText | None] = {"calibration": calibration, "evaluation": evaluation}
        self._read: dict[tuple[str, Part | None], ReadText] = {}

    def read(self, source: TextSource, part: Part, *, characters: int) -> ReadText:
        """The content of a source; of datasets of the hub the first rows that have so many `characters`.

        Raises:
            InputError: it cannot be read, is empty or is not what its name says.
        """
        key = (source.path, part if source.path.startswith((MIX, PYTHON)) else None)
        if key not in self._read:
            self._read[key] = self._open(source, part, characters)
        return self._read[key]

    def _open(self, source: TextSource, part: Part, characters: int) -> ReadText:
        path = source.path
        if path.startswith(MIX):
            return _of_rows(path, path, mix_rows(path.removeprefix(MIX), part))
        if path.startswith(PYTHON):
            return self._of_program(part)
        if path.startswith(HUB):
            from prismaquant_ray.calibration.datasets_library import hub_rows

            return _of_rows(path, path, hub_rows(path, characters))
        return _standard_input() if path == STDIN else _of_file(Path(path), part)

    def _of_program(self, part: Part) -> ReadText:
        given = self._given[part]
        if given is None:
            raise InputError(f"{part}.text was given by a program; name a file, or give it to the function again")
        if isinstance(given, str | bytes | Path):
            raise InputError("the text is one string; give a list of texts, or name a file in the configuration")
        rows = [*given]
        for number, row in enumerate(rows, 1):
            if not isinstance(row, str | Mapping):
                raise InputError(f"row {number} of the {part} text is {type(row).__name__}; give texts or mappings")
        return _of_rows(
            f"rows given by a program ({part})", "row", ({"text": r} if isinstance(r, str) else r for r in rows)
        )


def with_kinds(texts: Sequence[TextSource], shares: Sequence[float]) -> list[tuple[TextSource, float, bool]]:
    """Every source with its share, and whether it may give nothing; `mix:all` becomes its kinds, in equal parts."""
    found = []
    for text, share in zip(texts, shares, strict=True):
        if text.path == MIX_ALL:
            found += [(TextSource(path=f"{MIX}{kind}"), share / len(MIX_KINDS), True) for kind in MIX_KINDS]
        else:
            found.append((text, share, False))
    return found


def canonical(row: Mapping[str, object], where: str) -> str:
    """A row as JSON, always the same for the same values; InputError where they are not those of JSON."""
    try:
        return json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: its values are not those of JSON ({error})") from error


def _of_rows(name: str, places: str, rows: Iterable[Mapping[str, object]]) -> ReadText:
    """Rows that no file has as bytes: the digest is of their values."""
    digest, found = hashlib.sha256(), []
    for number, row in enumerate(rows, 1):
        where = f"{places} {number}" if places == "row" else f"{places}, row {number}"
        digest.update(f"{canonical(row, where)}\n".encode())
        found.append((where, row))
    if not found:
        raise InputError(f"{name}: there are no rows")
    return ReadText(name=name, digest=digest.hexdigest(), rows=found)


def _standard_input() -> ReadText:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("standard input is a terminal; pipe the text in, or name a file")
    data = sys.stdin.buffer.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise InputError(f"standard input has more than {_LARGEST:,} bytes; give a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text (byte {error.start:,}); convert it to UTF-8.") from error
    digest = hashlib.sha256(data).hexdigest()
    if _are_rows(text):
        return ReadText(name="standard input", digest=digest, rows=_lines(text, "standard input"))
    return _plain("standard input", digest, text)


def _of_file(path: Path, part: Part) -> ReadText:
    key = f"{part}.text"
    check_file(path, key)
    ending = path.suffix.lower()
    if ending in _NOT_TEXT:
        raise InputError(f"{key} {path}: {ending} is not read; write {_NOT_TEXT[ending]}, or plain text as .txt")
    try:
        if ending in _ROW_FILES and path.stat().st_size > _LARGEST:
            raise InputError(f"{key} {path}: has more than {_LARGEST:,} bytes; give a part of it")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{key} {path}: cannot be read ({error.strerror})") from error
    digest = hashlib.sha256(data).hexdigest()
    if ending == ".parquet":
        from prismaquant_ray.calibration.datasets_library import parquet_rows

        rows: Sequence[tuple[str, RawRow]] = [
            (f"{path}, row {number}", row) for number, row in enumerate(parquet_rows(data, str(path)), 1)
        ]
    else:
        text = read_text(path, key)
        if ending != ".jsonl":
            if _are_rows(text):
                raise InputError(f"{key} {path}: holds JSON, one object a line, not plain text; name it .jsonl")
            return _plain(str(path), digest, text)
        rows = _lines(text, str(path))
    if not rows:
        raise InputError(f"{key} {path}: there are no rows")
    return ReadText(name=str(path), digest=digest, rows=rows)


def _plain(name: str, digest: str, text: str) -> ReadText:
    if not text.strip():
        raise InputError(f"{name} is empty; give a text")
    return ReadText(name=name, digest=digest, plain=text)


def _lines(text: str, name: str) -> list[tuple[str, RawRow]]:
    # Not splitlines: it also splits at characters that JSON allows inside a string.
    lines = enumerate(text.split("\n"), 1)
    return [(f"{name}, line {number}", line) for number, line in lines if line.strip()]


def _are_rows(text: str) -> bool:
    """Whether the first lines are JSON objects."""
    first = [*islice((line for line in text.split("\n", 100) if line.strip()), _SNIFFED)]
    try:
        return bool(first) and all(parse_object(line) is not None for line in first)
    except MalformedError:
        return False
