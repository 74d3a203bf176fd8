"""The time that a plan's Linears take per token, by the roofline of a card, and the limits on it.

Two ends of the roofline are counted. A prompt's token in a large batch costs its products: 2 FLOP by parameter that it
meets, at the rate that the card has for the format's operands. A generated token of a single sequence costs the bytes
of the parameters that it meets, at the card's bandwidth. Of routed experts a token meets `top_k`. What does not depend
on the plan (attention, norms, what stays as it is) is in neither time, and neither is a vision tower, which no token of
text passes. An output head is for generated tokens only; a draft head counts as a layer, as where it is served.

Times are whole units, so that sums are exact and a plan is compared with a limit without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.allocation.limits import Limit
from prismaquant_ray.allocation.problem import Ints
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import refusal
from prismaquant_ray.gpus import GPUS, GpuName
from prismaquant_ray.layout import BlockKind, FusedGroup, Layout
from prismaquant_ray.records import PlanTimes
from prismaquant_ray.settings.allocation import LimitsConfig

__all__ = ["Times"]

# Kinds of blocks that a prompt's token passes, and those that a generated one passes.
_PROMPT = {BlockKind.DECODER, BlockKind.DRAFT}
_GENERATED = {*_PROMPT, BlockKind.HEAD}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Times:
    """Time of every group in every format, (groups, formats) int64, and of the fastest plan of any size.

    `prefill` counts units of `prefill_unit` seconds for a prompt's token, `decode` those of `decode_unit`, which are
    bytes. The fastest plan has the fastest format that each group's shape can take: rules do not move it.
    """

    gpu: GpuName
    prefill: Ints
    decode: Ints
    prefill_unit: Fraction
    decode_unit: Fraction
    fastest_prefill: int
    fastest_decode: int

    @classmethod
    def of(cls, layout: Layout, formats: Sequence[FormatName], weights: Ints, gpu: GpuName) -> Times:
        """Of the candidates of a layout; `weights` (groups, formats) are their codes and scales in bytes."""
        card = GPUS[gpu]
        rates = [card.rate(FORMATS[name].product_bits(card.capability)) for name in formats]
        # In units of this time every format takes a whole number of them for a parameter.
        common = math.lcm(*rates)
        kinds = [layout.block_of[group.name].kind for group in layout.groups]
        shares = [_met(layout, group) for group in layout.groups]
        prompt = [
            int(share * group.parameters) if kind in _PROMPT else 0
            for group, kind, share in zip(layout.groups, kinds, shares, strict=True)
        ]
        prefill = np.array(prompt, dtype=np.int64)[:, None] * np.array([common // rate for rate in rates])
        generated = [share if kind in _GENERATED else Fraction(0) for kind, share in zip(kinds, shares, strict=True)]
        above, below = np.array([share.as_integer_ratio() for share in generated], dtype=np.int64).T
        decode = weights * above[:, None] // below[:, None]
        takes = np.array([[refusal(name, group) is None for name in formats] for group in layout.groups])
        return cls(
            gpu=gpu,
            prefill=prefill,
            decode=decode,
            prefill_unit=Fraction(2, common),
            decode_unit=1 / card.bytes_per_second,
            fastest_prefill=_fastest(prefill, takes),
            fastest_decode=_fastest(decode, takes),
        )

    def limits(self, settings: LimitsConfig) -> tuple[Limit, ...]:
        """What the settings allow."""
        each = (
            ("prefill", settings.prefill, self.prefill, self.fastest_prefill),
            ("decode", settings.decode, self.decode, self.fastest_decode),
        )
        # The decimal number that was written, so that a plan of exactly this time is within it.
        return tuple(
            Limit(
                name=f"allocation.limits.{name}",
                use=use,
                limit=int(Fraction(str(most)) * fastest),
                unit=max(1, fastest),
            )
            for name, most, use, fastest in each
            if most is not None
        )

    def of_plan(self, columns: Ints, settings: LimitsConfig) -> PlanTimes:
        """The times of the plan with these columns (groups,), beside the limits that were set."""
        rows = np.arange(len(columns))
        prefill, decode = int(self.prefill[rows, columns].sum()), int(self.decode[rows, columns].sum())
        return PlanTimes(
            gpu=self.gpu,
            prefill=_ratio(prefill, self.fastest_prefill),
            decode=_ratio(decode, self.fastest_decode),
            prefill_seconds=float(prefill * self.prefill_unit),
            decode_seconds=float(decode * self.decode_unit),
            prefill_limit=settings.prefill,
            decode_limit=settings.decode,
        )


def _met(layout: Layout, group: FusedGroup) -> Fraction:
    """The share of a group's parameters that a token meets."""
    return Fraction(1) if group.experts is None else Fraction(min(layout.top_k, group.experts), group.experts)


def _fastest(units: Ints, takes: NDArray[np.bool_]) -> int:
    return int(np.where(takes, units, np.iinfo(np.int64).max).min(axis=1).sum())


def _ratio(units: int, fastest: int) -> float:
    """1 where no quantizable Linear is passed at all."""
    return units / fastest if fastest else 1.0
