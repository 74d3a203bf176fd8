"""The units that a model is run in, pass by pass, and shards of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Stage(StrEnum):
    """A pass over the blocks: two that measure a model, and one that runs it beside its quantized variants."""

    FORWARD = "forward"
    BACKWARD = "backward"
    EVALUATION = "evaluation"


#: The passes of a run, in order.
PASSES = (Stage.FORWARD, Stage.BACKWARD)


@dataclass(frozen=True, slots=True, order=True)
class Exit:
    """The final norm and head for one microbatch: stateless between microbatches, so any worker can run any of them."""

    microbatch: int


#: The smallest piece of a pass: patch embedding ("pixels"), token embedding ("entry"), a block by index, an exit.
Unit = int | Literal["pixels", "entry"] | Exit


def unit_key(unit: Unit) -> str:
    """Its directory in the run store."""
    if isinstance(unit, Exit):
        return f"exit-{unit.microbatch:05d}"
    return unit if isinstance(unit, str) else f"{unit:04d}"


def unit_of(key: str) -> Unit:
    """The unit of a directory in the run store."""
    if key in ("entry", "pixels"):
        return key  # type: ignore[return-value]
    return Exit(int(key.removeprefix("exit-"))) if key.startswith("exit-") else int(key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Consecutive units, in the order of their pass, that one worker holds at a time.

    `produce` are the blocks whose candidates or prices are missing; the others are run only because a later
    unit needs their output. `origins` are the units whose output the first one reads: a block or the entry,
    every exit for the last decoder block of the backward pass; the entry reads the merger, for images.
    """

    stage: Stage
    units: tuple[Unit, ...]
    produce: frozenset[Unit]
    origins: tuple[Unit, ...]
    microbatches: tuple[int, ...]

    @property
    def name(self) -> str:
        """For people and events, e.g. 0004-0007."""
        first, last = unit_key(self.units[0]), unit_key(self.units[-1])
        return first if first == last else f"{first}-{last}"
