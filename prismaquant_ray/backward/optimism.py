"""How optimistic prices are: they are taken on tokens most of which GPTQ and the choice of scales were fitted to.

Sequences that are held out say by how much, but they are few, and some tokens cost more than others whatever the
rounding. Rounded activations are fitted to nothing, so their price on the same tokens is the control: with W and A the
prices of rounded weights and of rounded activations, summed over groups,

    r = (W_held-out / A_held-out) / (W_all / A_all),

a ratio estimator with a control variate (Cochran, Sampling Techniques, ch. 6). Its standard error s is by jackknife
over blocks. It is shrunk towards 1 as far as it may be chance (James and Stein),

    r' = 1 + (r − 1) · max(0, 1 − s² / (r − 1)²),

and the price of weights is multiplied by r'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prismaquant_ray.block_records import BackwardRecord, Price
from prismaquant_ray.formats import FORMATS, FormatName


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimism:
    """Of one format: r with its standard error s, and r', which the prices of rounded weights are multiplied by."""

    ratio: float
    standard_error: float
    factor: float


#: Where nothing is held out, or nothing is rounded.
NONE = Optimism(ratio=1.0, standard_error=0.0, factor=1.0)


def optimism(formats: Sequence[FormatName], records: Sequence[BackwardRecord]) -> dict[FormatName, Optimism]:
    """Of every format that rounds weights, from the records of a model's blocks."""
    held_out = sum(record.held_out_tokens for record in records)
    found = {}
    for name in formats:
        if FORMATS[name].codec is not None:
            rows = [sums for record in records if (sums := _sums(record, name)) is not None]
            found[name] = _optimism(np.array(rows)) if rows and held_out else NONE
    return found


def _sums(record: BackwardRecord, name: FormatName) -> tuple[float, ...] | None:
    """W and A on all tokens, then on those held out, and the standard error of the latter's price; of one block."""
    priced = [(prices[name], _control(prices, name)) for prices in record.groups.values() if name in prices]
    if not priced:
        return None
    return (
        sum(price.weight_cost for price, _ in priced),
        sum(control.activation_cost for _, control in priced),
        sum(price.held_out.weight_cost for price, _ in priced),
        sum(control.held_out.activation_cost for _, control in priced),
        sum(price.held_out.standard_error for price, _ in priced),
    )


def _control(prices: Mapping[FormatName, Price], name: FormatName) -> Price:
    """The price of a group with the activations to compare with: the format's own, or the most that others round."""
    if prices[name].activation_cost > 0:
        return prices[name]
    return max(prices.values(), key=lambda price: price.activation_cost)


def _optimism(rows: NDArray[np.float64]) -> Optimism:
    """From one row of `_sums` a block."""
    total = rows.sum(0)
    controlled = total[1] > 0 and total[3] > 0
    if not (total[0] > 0 and total[2] > 0):
        return NONE

    def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = sums[..., 2] / sums[..., 0]
        return found * sums[..., 1] / sums[..., 3] if controlled else found

    measured = float(ratio(total))
    variance = 0.0
    # Blocks without an effect say nothing, and one that has all of it cannot be left out.
    rest = (total - rows)[(rows[:, 0] > 0) & (rows[:, 2] > 0)]
    rest = rest[(rest[:, 0] > 0) & (rest[:, 2] > 0) & ((rest[:, 3] > 0) | (not controlled))]
    if len(rest) > 1:
        left_out = ratio(rest)
        variance = float((len(rest) - 1) / len(rest) * np.square(left_out - left_out.mean()).sum())
    if not controlled:
        # Which tokens are held out is chance for all blocks alike.
        variance += float(measured * total[4] / total[2]) ** 2
    excess = measured - 1.0
    # A single block says nothing about chance.
    kept = max(0.0, 1.0 - variance / excess**2) if excess and len(rest) > 1 else 0.0
    return Optimism(ratio=measured, standard_error=float(np.sqrt(variance)), factor=1.0 + excess * kept)
