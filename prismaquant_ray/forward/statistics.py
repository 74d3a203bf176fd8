"""Statistics of a Linear's input over the calibration set, for rounding.

X is the input of one input group, (tokens, I). Training tokens drive scale search and GPTQ; held-out tokens
decide whether GPTQ is accepted. Each of E experts reads its own share of the tokens, and has its own statistics.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prismaquant_ray.kernels import operator

#: Shrinkage: κ = PRIOR_SHARE × in_features pseudo-tokens of the layer's mean are added to each expert's statistics.
#: With fewer tokens than columns a Hessian is singular and fits noise; κ regularizes it and is negligible beside many.
PRIOR_SHARE = 0.25

# Rows summed by one product. A constant, so that an expert's sums do not depend on which experts it is batched with.
_TILE = 128
# Columns of a dense input's sum computed by one product: narrow, and little below the diagonal is computed twice.
_PANEL = 256
# Float32 elements gathered at a time.
_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prior:
    """Shrinkage: κ pseudo-tokens of the layer's mean x xᵀ, added to every expert's statistics.

    `train` and `holdout` (I, I) float32 are sums over `train_tokens` and `holdout_tokens` pseudo-tokens: κ, or 0 where
    there were no tokens at all.
    """

    train: Tensor
    holdout: Tensor
    train_tokens: int
    holdout_tokens: int

    @classmethod
    def of(cls, pooled: InputStatistics) -> Prior:
        """From sums over all rows of a layer; a token counts once per expert that it is routed to."""
        return cls._scaled(pooled.train, pooled.holdout, int(pooled.train_tokens), int(pooled.holdout_tokens))

    @classmethod
    def _scaled(cls, train: Tensor, holdout: Tensor, train_tokens: int, holdout_tokens: int) -> Prior:
        kappa = round(PRIOR_SHARE * train.shape[-1])
        return cls(
            train=train * (kappa / max(train_tokens, 1)),
            holdout=holdout * (kappa / max(holdout_tokens, 1)),
            train_tokens=kappa if train_tokens else 0,
            holdout_tokens=kappa if holdout_tokens else 0,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InputStatistics:
    """Sums over tokens: `train` and `holdout` are Σ x xᵀ (I, I) float32.

    `amax` (I,) is max |x| of every column. For E experts: (E, I, I), prior included, and (E, I); their own token
    counts are int64 (E,), the prior's `train_prior` and `holdout_prior`.
    """

    train: Tensor
    holdout: Tensor
    train_tokens: int | Tensor
    holdout_tokens: int | Tensor
    amax: Tensor
    train_prior: int = 0
    holdout_prior: int = 0

    @classmethod
    def routed(cls, x: Tensor, counts: Tensor, held_out: Tensor, prior: Prior | None = None) -> InputStatistics:
        """Of experts that read x (R, I): the first `counts[0]` rows go to the first expert, and so on.

        counts (E,) int64, held_out (R,) bool. `prior` is the layer's where these are not all its experts.
        """
        expert = torch.repeat_interleave(counts, output_size=len(x))
        holdout_tokens = torch.zeros_like(counts).scatter_add_(0, expert, held_out.to(counts.dtype))
        train_tokens = counts - holdout_tokens
        # Rows held out behind the others, both sorted by expert.
        rows = torch.argsort(held_out.to(torch.uint8), stable=True)
        starts = train_tokens.cumsum(0) - train_tokens
        train = expert_moments(x, rows, starts, train_tokens)
        starts = train_tokens.sum() + holdout_tokens.cumsum(0) - holdout_tokens
        holdout = expert_moments(x, rows, starts, holdout_tokens)
        prior = prior or Prior._scaled(train.sum(0), holdout.sum(0), int(train_tokens.sum()), int(holdout_tokens.sum()))
        amax = torch.zeros(len(counts), x.shape[1], dtype=x.dtype, device=x.device)
        amax.scatter_reduce_(0, expert.unsqueeze(1).expand_as(x), x.abs(), "amax")
        return cls(
            train=train.add_(prior.train),
            holdout=holdout.add_(prior.holdout),
            train_tokens=train_tokens,
            holdout_tokens=holdout_tokens,
            amax=amax.float(),
            train_prior=prior.train_tokens,
            holdout_prior=prior.holdout_tokens,
        )

    def experts(self, start: int, stop: int) -> InputStatistics:
        """Of experts start..stop, as views."""
        assert isinstance(self.train_tokens, Tensor)
        assert isinstance(self.holdout_tokens, Tensor)
        return InputStatistics(
            train=self.train[start:stop],
            holdout=self.holdout[start:stop],
            train_tokens=self.train_tokens[start:stop],
            holdout_tokens=self.holdout_tokens[start:stop],
            amax=self.amax[start:stop],
            train_prior=self.train_prior,
            holdout_prior=self.holdout_prior,
        )

    def divided_by(self, s: Tensor) -> InputStatistics:
        """Of the input x / s, for s (I,) or (E, I). Overwrites these."""
        for matrix in (self.train, self.holdout):
            matrix.div_(s.unsqueeze(-1)).div_(s.unsqueeze(-2))
        self.amax.div_(s)
        return self

    @property
    def largest(self) -> float:
        """max |x| over all tokens."""
        return float(self.amax.max())

    @property
    def train_weight(self) -> Tensor:
        """Tokens that `train` sums over, those of the prior included: int64, () or (E,)."""
        return torch.as_tensor(self.train_tokens) + self.train_prior

    @property
    def holdout_weight(self) -> Tensor:
        """The same of `holdout`."""
        return torch.as_tensor(self.holdout_tokens) + self.holdout_prior

    @property
    def is_judged(self) -> bool:
        """Whether there are held-out tokens."""
        return self.holdout_prior > 0 or bool((torch.as_tensor(self.holdout_tokens) > 0).any())

    @property
    def importance(self) -> Tensor:
        """E[x²] per column, (I,) or (E, I), over training tokens."""
        tokens = self.train_weight.clamp(min=1)
        # A number of tokens has no dimension: it may be on the CPU while the sums are not.
        return self.train.diagonal(dim1=-2, dim2=-1) / (tokens.unsqueeze(-1) if tokens.dim() else tokens)


class InputSums:
    """Statistics of one input while microbatches arrive. Not for experts.

    Adding microbatches in a fixed order gives the same bits however the work is spread.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, in_features, in_features, device=device)
        self._tokens = [0, 0]
        self._amax = torch.zeros(in_features, device=device)

    def add(self, train: Tensor, holdout: Tensor) -> None:
        """The rows (tokens, I) of a microbatch that drive rounding, and those that judge it; either may be none."""
        for place, given in enumerate((train, holdout)):
            if not len(given):
                continue
            self._tokens[place] += len(given)
            # One kernel on a GPU, and slow on a CPU.
            if given.is_cpu:
                largest = given.abs().amax(0).float()
            else:
                largest = torch.linalg.vector_norm(given, math.inf, 0, dtype=torch.float32)
            self._amax = torch.maximum(self._amax, largest)
            add_moments(self._sums[place], given)

    def statistics(self) -> InputStatistics:
        """The statistics of all microbatches. They share memory with the sums, so `add` must not follow."""
        for matrix in self._sums:
            for start in range(0, matrix.shape[0], _PANEL):
                panel = slice(start, start + _PANEL)
                matrix[panel, :start] = matrix[:start, panel].T
        (train, holdout), (train_tokens, holdout_tokens) = self._sums, self._tokens
        return InputStatistics(
            train=train,
            holdout=holdout,
            train_tokens=train_tokens,
            holdout_tokens=holdout_tokens,
            amax=self._amax,
        )


def _add_moments(sums: Tensor, rows: Tensor) -> None:
    rows = rows.to(torch.float32)
    for start in range(0, rows.shape[1], _PANEL):
        panel = slice(start, start + _PANEL)
        sums[: panel.stop, panel].addmm_(rows[:, : panel.stop].T, rows[:, panel])


#: Add Σ x xᵀ over rows (R, I) to float32 sums (I, I). It is symmetric: the part below the diagonal may be left out.
add_moments = operator("add_moments(Tensor(a!) sums, Tensor rows) -> ()", _add_moments)


def divided(x: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (tokens, I) of x (sequences, tokens, I) that are not held out, and that are; held_out (sequences,) bool.

    A mask on the CPU is cut into runs of sequences; one on the device would have the host wait for its count.
    """
    found: tuple[list[Tensor], list[Tensor]] = ([x[:0]], [x[:0]])
    start = 0
    for held, run in itertools.groupby(held_out.tolist()):
        stop = start + sum(1 for _ in run)
        found[held].append(x[start:stop])
        start = stop
    train, holdout = (torch.cat(parts).flatten(0, 1) for parts in found)
    return train, holdout


def output_error(delta: Tensor, hessian: Tensor) -> Tensor:
    """Per output row (…, O): Σ_t (ΔW x_t)² = diag(ΔW H ΔWᵀ), for ΔW (…, O, I) and symmetric H = Σ x xᵀ (…, I, I).

    The part above the diagonal counts twice, the part below is not read.
    """
    total = torch.zeros(delta.shape[:-1], device=delta.device)
    for start in range(0, delta.shape[-1], _PANEL):
        panel = slice(start, start + _PANEL)
        own = delta[..., panel]
        through = own @ hessian[..., panel, panel]
        if start:
            through += (delta[..., :start] @ hessian[..., :start, panel]).mul_(2)
        total += through.mul_(own).sum(-1)
    return total


def _expert_moments(x: Tensor, rows: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """By tiles of rows.

    Experts with most rows come first, so those that still have rows after some tiles are the first few, and no expert
    is padded by more than a tile.
    """
    sums = torch.zeros(len(counts), x.shape[1], x.shape[1], device=x.device)
    place = torch.arange(_TILE, device=x.device)
    for experts in torch.argsort(counts, descending=True, stable=True).split(max(1, _CHUNK // (_TILE * x.shape[1]))):
        own = counts[experts].unsqueeze(1)
        part = torch.zeros(len(experts), x.shape[1], x.shape[1], device=x.device)
        for tile in range(0, int(own[0]), _TILE):
            active = int((own > tile).sum())
            index = starts[experts[:active]].unsqueeze(1) + tile + place
            piece = x[rows[index.clamp_(max=len(rows) - 1)]].to(torch.float32)
            piece.masked_fill_((tile + place >= own[:active]).unsqueeze(-1), 0.0)
            part[:active].baddbmm_(piece.mT, piece)
        sums[experts] = part
    return sums


#: Σ x xᵀ (E, I, I) float32 over each expert's rows: those of x (R, I) at rows[starts[e]], … (counts[e] of them).
expert_moments = operator(
    "expert_moments(Tensor x, Tensor rows, Tensor starts, Tensor counts) -> Tensor", _expert_moments
)
