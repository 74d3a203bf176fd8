"""Settings every test runs under."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before transformers is imported: nothing is fetched, nothing draws bars.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
from hypothesis import settings

# A slow machine is not a failure; nothing is timed in tests.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_SUMMARIES: dict[str, list[str]] = {}


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny checkpoint of every family, made when it is first asked for; do not write into it."""

    class Made(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            from tests.tiny_families import make_family

            self[family] = make_family(tmp_path_factory.mktemp("family") / family, family)
            return self[family]

    return Made()


def summarise(title: str, line: str) -> None:
    """Have a line printed under a title at the end of the test run."""
    _SUMMARIES.setdefault(title, []).append(line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for title, lines in _SUMMARIES.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)
