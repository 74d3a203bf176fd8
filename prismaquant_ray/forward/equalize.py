"""Choosing the factors of folds: large channels of an input are divided by s, which its readers' columns take instead.

An activation's rounding error is that of the largest of its group; with rms that differ less between channels all of
them keep more bits. s_j = rms_j^a ‖W_:j‖^-b over its geometric mean is the family that SmoothQuant (Xiao et al., 2023)
and AWQ (Lin et al., 2024) draw from; a and b are searched, by the output error of both roundings together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.factors import expanded, pooled
from prismaquant_ray.fold import Fold
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.base import Format
from prismaquant_ray.formats.nvfp4 import input_divisor
from prismaquant_ray.forward.kept_rows import spaced
from prismaquant_ray.forward.scale_search import nearest

#: Exponents a and b that are tried beside s = 1.
EXPONENTS = tuple(itertools.product((0.25, 0.375, 0.5), (0.0, 0.25, 0.5)))
# Largest |ln s|.
_LARGEST = 6.0
# What searched scales and GPTQ leave of the error of rounding to nearest.
_LEFT = 0.3
# Rows of the readers' weights that rounding is tried on.
_OUTPUTS = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """An input and the weights that meet it, for E experts with factors of their own, else E = 1; C columns.

    `importance` (E, C) is E[x²], `amax` (E, C) the largest |x|; `rows` (N, C) float32 are some of its rows, `expert`
    (N,) whose each is. `weights` are (O, C) or (E, O, C).
    """

    importance: Tensor
    amax: Tensor
    rows: Tensor
    expert: Tensor
    weights: Sequence[Tensor]


def judged_by(formats: Sequence[FormatName]) -> Format | None:
    """The format of a run that equalization is for: activations of four bits; None without one.

    For rounded weights alone the search made GPTQ's result worse (docs/log.md).
    """
    ordered = [FORMATS[name] for name in FORMATS if name in formats]
    return next((each for each in ordered if each.activation_bits == 4), None)


def chosen_factors(fold: Fold, reading: Reading, rounding: Format, *, powers_of_two: bool) -> Tensor | None:
    """The best s (channels,) or (experts, channels), float32; None where s = 1 is the best.

    Powers of two change no bit of what stays in 16 bits.
    """
    member = fold.multiplied[0]
    squares = torch.stack([each.float().square().sum(-2) for each in reading.weights]).sum(0).view_as(reading.amax)
    tried = _candidates(pooled(member, reading.importance), pooled(member, squares))
    if powers_of_two:
        tried = torch.exp2(torch.log2(tried).round())
    along = expanded(member, tried)
    errors = _activation_errors(along, reading, squares, rounding) + _LEFT * _weight_errors(along, reading, rounding)
    best = int(errors.argmin())
    if best == 0:
        return None
    return tried[best] if fold.experts is not None else tried[best, 0]


def _candidates(importance: Tensor, squares: Tensor) -> Tensor:
    """Factors (M, E, channels): ones, then one for each pair of exponents. A channel that is never used keeps one."""
    used = (importance > 0) & (squares > 0)
    ln_rms, ln_norm = (torch.where(used, each, 1.0).log() / 2 for each in (importance, squares))
    exponents = torch.tensor([(0.0, 0.0), *EXPONENTS], device=importance.device).view(-1, 2, 1, 1)
    ln_s = exponents[:, 0] * ln_rms - exponents[:, 1] * ln_norm
    mean = ln_s.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(used, ln_s - mean, 0.0).clamp_(-_LARGEST, _LARGEST).exp_()


def _activation_errors(s: Tensor, reading: Reading, squares: Tensor, rounding: Format) -> Tensor:
    """E |(Q(x/s) − x/s) (W s)ᵀ|² (M,) with errors of columns taken as independent, for s (M, E, C)."""
    assert rounding.round_activation is not None
    count = len(reading.rows)
    # One expert's factors are broadcast.
    of_row = s if s.shape[1] == 1 else s[:, reading.expert]
    x = (reading.rows / of_row).flatten(0, 1)
    scale = None
    if rounding.static_input_scale:
        largest = (reading.amax / s).amax((1, 2))
        scale = input_divisor(largest).repeat_interleave(count).view(-1, 1, 1)
    errors = rounding.round_activation(x, scale).sub_(x).square_().view(len(s), count, -1)
    weighted = s.square() * squares
    return (errors * (weighted if s.shape[1] == 1 else weighted[:, reading.expert])).sum((1, 2)) / count


def _weight_errors(s: Tensor, reading: Reading, rounding: Format) -> Tensor:
    """E |x/s (Q(W s) − W s)ᵀ|² (M,) by rounding some rows of W to nearest, errors independent, for s (M, E, C)."""
    codec, experts = rounding.codec, s.shape[1]
    assert codec is not None
    outputs = sum(each.shape[-2] for each in reading.weights)
    step = spaced(outputs, max(1, _OUTPUTS // experts)).step
    rows = torch.cat([each[..., ::step, :].float() for each in reading.weights], dim=-2)
    scaled = (rows.view(experts, -1, s.shape[-1]) * s.unsqueeze(-2)).flatten(0, 1)
    rounded = nearest(scaled, codec, codec.global_scale(scaled.abs().amax((-2, -1), keepdim=True)))
    errors = codec.dequantized(rounded).float().sub_(scaled).square_().mean(-2).view_as(s) * outputs
    tokens = torch.zeros(experts, device=s.device).scatter_add_(0, reading.expert, torch.ones_like(reading.rows[:, 0]))
    share = (tokens / tokens.sum()).unsqueeze(-1)
    return (errors * reading.importance / s.square() * share).sum((1, 2))


def representable(weight: Tensor, s: Tensor, stored: torch.dtype, shift: float) -> Tensor:
    """The s (channels,) nearest to the given one that a norm's weight can take exactly: γ / s is what it stores.

    γ is weight + shift. Where γ is zero, s is one.
    """
    gamma = weight.float() + shift
    kept = (gamma / s - shift).to(stored).float() + shift
    found = gamma / kept
    return torch.where(torch.isfinite(found) & (found > 0), found, 1.0)
