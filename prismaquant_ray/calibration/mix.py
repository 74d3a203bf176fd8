"""The text that comes with the project: six kinds, each in a part for calibration and one that no calibration reads.

`mix/README.md` says where it is from; `benchmarks/make_mix.py` made it.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from prismaquant_ray.parsing import parse_object

_FILE = Path(__file__).parent / "mix" / "mix.jsonl.xz"


def mix_rows(kind: str, part: str) -> list[Mapping[str, Any]]:
    """The rows of a kind, of `calibration` or `evaluation`: texts, or messages of a chat."""
    return [row["row"] for row in _documents() if row["kind"] == kind and row["part"] == part]


@cache
def _documents() -> tuple[dict[str, Any], ...]:
    return tuple(parse_object(line) for line in lzma.decompress(_FILE.read_bytes()).split(b"\n") if line)
