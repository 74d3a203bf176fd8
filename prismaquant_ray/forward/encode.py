"""From a fused group's weights to their codes: global scale, scale search, GPTQ, acceptance on held-out tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prismaquant_ray.block_records import LinearRounding, Method
from prismaquant_ray.formats.base import Codec, Rounded
from prismaquant_ray.forward.gptq import Gptq, HessianFactor, factorize, gptq
from prismaquant_ray.forward.scale_search import ScaleSearch, nearest, round_with, searched
from prismaquant_ray.forward.statistics import InputStatistics, output_error

# Methods in order of simplicity, so that a tie goes to the first.
METHODS: tuple[Method, ...] = ("nearest", "search", "gptq")
# Weights that are in float32 at a time.
AT_ONCE = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """How weights become codes. `gptq=None` leaves searched rounding as it is."""

    scale_search: ScaleSearch = field(default_factory=ScaleSearch)
    gptq: Gptq | None = field(default_factory=Gptq)

    def factor(self, statistics: InputStatistics) -> HessianFactor | None:
        """The Cholesky factor that everything reading this input shares.

        For an expert without training tokens it is the unit matrix: no error is propagated, and GPTQ returns the
        searched rounding.
        """
        if self.gptq is None:
            return None
        factor = factorize(statistics.train, self.gptq)
        if isinstance(statistics.train_tokens, Tensor):
            unseen = statistics.train_tokens == 0
            # Not by a mask as an index: the host would have to wait for how many there are.
            factor.upper.masked_fill_(unseen.view(-1, 1, 1), 0.0)
            factor.upper.diagonal(dim1=1, dim2=2).masked_fill_(unseen.unsqueeze(1), 1.0)
        return factor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedLinear:
    """One Linear on a codec's grid, with the figures that explain the choice; or the same Linear of every expert.

    The figures are of the BF16 weights that the runtime decodes; an expert's tokens include its prior's.
    """

    rounded: Rounded
    figures: LinearRounding


def encode_group(
    weights: Sequence[Tensor],
    codec: Codec,
    statistics: InputStatistics,
    factor: HessianFactor | None,
    rounding: Rounding,
    scales: Sequence[Tensor] | None = None,
) -> list[EncodedLinear]:
    """Round the members of one fused group, each (O, I) or (E, O, I), under one global scale (per expert).

    They are stacked along their rows for one search and one GPTQ call; acceptance is decided per Linear (and expert).
    At most `AT_ONCE` weights are in float32 at a time: a chunk of experts, or of rows. With stored `scales` of each
    member, (O, G) or (E, O, G), every weight becomes the nearest value under these, and nothing is searched.
    """
    if weights[0].dim() == 2:
        return _encode(weights, codec, statistics, factor, rounding, scales)
    size = sum(weight[0].numel() for weight in weights)
    at_once = max(1, AT_ONCE // size)
    parts = [
        _encode(
            [weight[start : start + at_once] for weight in weights],
            codec,
            statistics.experts(start, start + at_once),
            factor.experts(start, start + at_once) if factor else None,
            rounding,
            None if scales is None else [scale[start : start + at_once] for scale in scales],
        )
        for start in range(0, len(weights[0]), at_once)
    ]
    return [_joined(member) for member in zip(*parts, strict=True)]


def _encode(
    weights: Sequence[Tensor],
    codec: Codec,
    statistics: InputStatistics,
    factor: HessianFactor | None,
    rounding: Rounding,
    given: Sequence[Tensor] | None = None,
) -> list[EncodedLinear]:
    given_scale = None if given is None else torch.cat(list(given), dim=-2)
    stacked = weights[0] if len(weights) == 1 else torch.cat(list(weights), dim=-2)
    amax = torch.maximum(stacked.amax((-2, -1)), -stacked.amin((-2, -1)))
    global_scale = codec.global_scale(amax.view(1) if stacked.dim() == 2 else amax.view(-1, 1, 1))
    judge = statistics.holdout if statistics.is_judged else statistics.train
    tokens = statistics.holdout_weight if statistics.is_judged else statistics.train_weight
    # Every attempt is kept, in one byte per weight, until the rows of a Linear can be judged together.
    kept: list[Tensor] = []
    scales: list[list[Tensor]] = []
    judged: list[Tensor] = []
    # Whole blocks of rows that share scales.
    at_once = codec.rows * max(1, AT_ONCE * stacked.shape[-2] // stacked.numel() // codec.rows)
    for rows, piece in _with_rows(stacked.split(at_once, dim=-2)):
        weight = piece.to(torch.float32)
        if given_scale is None:
            found = _attempts(weight, codec, global_scale, statistics, factor, rounding)
        else:
            found = [round_with(weight, given_scale[..., rows, :], codec, global_scale)]
        kept = kept or [torch.empty_like(stacked, dtype=codec.kept) for _ in found]
        for values, rounded in zip(kept, found, strict=True):
            values[..., rows, :].copy_(rounded.values)
        scales.append([rounded.scale for rounded in found])
        judged.append(_judged(found, codec, piece, judge))
    tried = [
        Rounded(values=values, scale=torch.cat(parts, dim=-2), global_scale=global_scale)
        for values, parts in zip(kept, zip(*scales, strict=True), strict=True)
    ]
    output_errors, squares = torch.cat(judged, dim=-1)
    figures = []
    for rows, weight in _with_rows(weights):
        scores = output_errors[..., rows].sum(-1).double() / (tokens.clamp(min=1) * weight.shape[-2])
        mean_squares = squares[..., rows].sum(-1) / weight.shape[-2:].numel()
        figures.append(torch.stack([scores, mean_squares.double()]))
    encoded = []
    judgements = torch.stack(figures)
    # The host waits once for the figures of all Linears.
    by_linear = zip(_with_rows(weights), judgements, judgements.cpu(), strict=True)
    for (rows, _), judgement, (scores, mean_squares) in by_linear:
        choice = scores.argmin(0)
        winner = choice.tolist()
        of_linear = [each.rows(rows.start, rows.stop) for each in tried]
        encoded.append(
            EncodedLinear(
                rounded=_chosen(of_linear, judgement[0].argmin(0)) if isinstance(winner, list) else of_linear[winner],
                figures=LinearRounding(
                    method=[METHODS[each] for each in winner] if isinstance(winner, list) else METHODS[winner],
                    holdout_error=dict(zip(METHODS, scores.tolist(), strict=False)),
                    weight_mse=mean_squares.gather(0, choice.unsqueeze(0))[0].tolist(),
                ),
            )
        )
    return encoded


def _attempts(
    weight: Tensor,
    codec: Codec,
    global_scale: Tensor | None,
    statistics: InputStatistics,
    factor: HessianFactor | None,
    rounding: Rounding,
) -> list[Rounded]:
    """One rounding per entry of METHODS, for float32 weight; without GPTQ when there is no factor."""
    near = search = nearest(weight, codec, global_scale)
    if codec.searched:
        search = searched(weight, codec, global_scale, statistics.importance, rounding.scale_search)
    # Equal scales give the same rounding. Of a GPU the host would have to wait for the answer.
    if search.scale.is_cpu and torch.equal(_raw(search.scale), _raw(near.scale)):
        search = near
    return [near, search, gptq(weight, search, codec, factor)] if factor else [near, search]


def _judged(found: Sequence[Rounded], codec: Codec, weight: Tensor, judge: Tensor) -> Tensor:
    """Output error and ΔW² of every row, (2, methods, …, O); a rounding that occurs twice is judged once."""
    errors = {}
    for rounded in dict.fromkeys(found):
        delta = codec.dequantized(rounded).to(torch.float32).sub_(weight)
        errors[rounded] = torch.stack([output_error(delta, judge), delta.square().sum(-1)])
    return torch.stack([errors[rounded] for rounded in found], dim=1)


def _chosen(tried: Sequence[Rounded], choice: Tensor) -> Rounded:
    """Of a stack tried[choice[e]] for each expert e."""
    values, scale = tried[0].values, tried[0].scale
    for place, other in enumerate(tried[1:], start=1):
        chosen = (choice == place).view(-1, 1, 1)
        values = torch.where(chosen, _raw(other.values), _raw(values)).view(values.dtype)
        scale = torch.where(chosen, _raw(other.scale), _raw(scale)).view(scale.dtype)
    return Rounded(values=values, scale=scale, global_scale=tried[0].global_scale)


def _raw(tensor: Tensor) -> Tensor:
    """As bytes: float8 has no arithmetic."""
    return tensor.view(torch.uint8)


def _with_rows(pieces: Iterable[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Pieces stacked along the rows, each with its rows in the stack."""
    stop = 0
    for piece in pieces:
        start, stop = stop, stop + piece.shape[-2]
        yield slice(start, stop), piece


def _joined(parts: Sequence[EncodedLinear]) -> EncodedLinear:
    """Stacks of experts concatenated."""
    if len(parts) == 1:
        return parts[0]
    scales = [part.rounded.global_scale for part in parts if part.rounded.global_scale is not None]
    return EncodedLinear(
        rounded=Rounded(
            values=torch.cat([part.rounded.values for part in parts]),
            scale=torch.cat([part.rounded.scale for part in parts]),
            global_scale=torch.cat(scales) if scales else None,
        ),
        figures=LinearRounding.joined([part.figures for part in parts]),
    )
