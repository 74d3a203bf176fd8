"""Settings every test runs under."""

from __future__ import annotations

import os
from typing import Any

# Before transformers is imported: nothing is fetched, nothing draws bars.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from hypothesis import settings

# A slow machine is not a failure; nothing is timed in tests.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_SUMMARIES: dict[str, list[str]] = {}


def summarise(title: str, line: str) -> None:
    """Have a line printed under a title at the end of the test run."""
    _SUMMARIES.setdefault(title, []).append(line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for title, lines in _SUMMARIES.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)
