"""A model's config.json as JSON that every reader takes, and as transformers' configuration classes take it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_QUANTIZATION = "quantization_config"
# How transformers writes what JSON has no numbers for: {"__float__": "Infinity"}. Many files on the hub have the bare
# words instead, which Python's JSON reads and writes, and others refuse.
_TAG = "__float__"
# Parts of names of sizes, and the largest that a model may have: transformers makes lists and tables of them. The first
# part that is in a name decides.
_LARGEST = {
    "vocab": 1 << 24,
    "chunk": 1 << 13,
    **dict.fromkeys(("layer", "expert", "depth", "group", "state", "conv", "kernel"), 1 << 14),
    **dict.fromkeys(("dim", "size", "rank", "head", "width"), 1 << 24),
}
_NAMES = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration without numbers that JSON does not have, and without a quantization that is null."""
    found = {key: _portable(value) for key, value in config.items()}
    if found.get(_QUANTIZATION, True) is None:
        del found[_QUANTIZATION]
    return found


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return portable(value)
    if isinstance(value, list):
        return [_portable(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def with_numbers(config: Any) -> Any:
    """The configuration with tagged numbers as floats."""
    if isinstance(config, Mapping):
        if set(config) == {_TAG} and config[_TAG] in _NAMES:
            return _NAMES[config[_TAG]]
        return {key: with_numbers(value) for key, value in config.items()}
    return [with_numbers(value) for value in config] if isinstance(config, list) else config


def absurd_size(config: Mapping[str, Any]) -> str | None:
    """The first value in a configuration that no model has, e.g. num_hidden_layers = 1000000000; None without any."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            found = absurd_size(value)
            if found is not None:
                return found
        most = next((most for part, most in _LARGEST.items() if part in key), math.inf)
        if isinstance(value, int):
            most = min(most, 1 << 63)
        strange = isinstance(value, int | float) and not -most <= value <= most
        if strange or (key == "model_type" and not isinstance(value, str | None)):
            return f"{key} = {str(value)[:30]}"
    return None
