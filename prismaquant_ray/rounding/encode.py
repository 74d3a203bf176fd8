"""From a fused group's weights to what ships: global scale, scale search, GPTQ, acceptance on held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prismaquant_ray.formats.base import Codec, Rounded
from prismaquant_ray.rounding.gptq import Gptq, HessianFactor, factorize, gptq
from prismaquant_ray.rounding.hessian import InputStatistics, output_error
from prismaquant_ray.rounding.scale_search import ScaleSearch, nearest, searched

Method = Literal["nearest", "search", "gptq"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """How weights become codes. `gptq=None` leaves searched rounding as it is."""

    scale_search: ScaleSearch = field(default_factory=ScaleSearch)
    gptq: Gptq | None = field(default_factory=Gptq)

    def factor(self, statistics: InputStatistics) -> HessianFactor | None:
        """The Cholesky factor that everything reading this input shares."""
        return factorize(statistics.train, self.gptq) if self.gptq else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedLinear:
    """One Linear on a codec's grid, with the figures that explain the choice.

    `holdout_error` gives Σ_t |ΔW x_t|² over held-out tokens per output for each method tried, divided by
    tokens × outputs; the smallest one won. `weight_mse` is mean ΔW²; `output_mse` is the mean squared output
    error over all calibration tokens, weights only. All from the BF16 weights the runtime decodes.
    """

    rounded: Rounded
    method: Method
    holdout_error: dict[str, float]
    weight_mse: float
    output_mse: float


def encode_group(
    weights: Sequence[Tensor],
    codec: Codec,
    statistics: InputStatistics,
    factor: HessianFactor | None,
    rounding: Rounding,
) -> list[EncodedLinear]:
    """Round the members of one fused group, each (O, I), under one global scale.

    They are stacked along their rows for one search and one GPTQ call; acceptance is decided for each Linear.
    """
    stacked = torch.cat([weight.to(torch.float32) for weight in weights])
    global_scale = codec.global_scale(float(stacked.abs().max()))
    attempts: dict[Method, Rounded] = {"nearest": nearest(stacked, codec, global_scale)}
    attempts["search"] = searched(stacked, codec, global_scale, statistics.importance, rounding.scale_search)
    if factor is not None:
        attempts["gptq"] = gptq(stacked, attempts["search"], codec, factor)
    deltas = {method: codec.dequantized(rounded).float().sub_(stacked) for method, rounded in attempts.items()}
    judge = statistics.holdout if statistics.holdout_tokens else statistics.train
    tokens = statistics.holdout_tokens or statistics.train_tokens
    errors = {method: output_error(delta, judge) for method, delta in deltas.items()}
    encoded = []
    row = 0
    for weight in weights:
        rows = slice(row, row + weight.shape[0])
        row = rows.stop
        scores = {m: float(error[rows].sum()) / (tokens * weight.shape[0]) for m, error in errors.items()}
        method = _winner(scores)
        delta = deltas[method][rows]
        total = output_error(delta, statistics.train) + output_error(delta, statistics.holdout)
        all_tokens = statistics.train_tokens + statistics.holdout_tokens
        encoded.append(
            EncodedLinear(
                rounded=attempts[method].rows(rows.start, rows.stop),
                method=method,
                holdout_error={str(m): score for m, score in scores.items()},
                weight_mse=float(delta.square().mean()),
                output_mse=float(total.sum()) / (all_tokens * weight.shape[0]),
            )
        )
    return encoded


def _winner(scores: Mapping[Method, float]) -> Method:
    """The smallest error; a tie goes to the simpler method, which comes first."""
    return min(scores, key=lambda method: scores[method])
