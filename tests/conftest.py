"""Settings every test runs under."""

from __future__ import annotations

import os

# Before transformers is imported: nothing is fetched, nothing draws bars.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from hypothesis import settings

# A slow machine is not a failure; nothing is timed in tests.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
